"""The picture of a comparison: loss by step and by time, and steps to a target."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanogpt.report.curves import Curve, diverged, steps_to_reach
from nanogpt.report.dots import ROW, Row, draw_dots, interval, room
from nanogpt.report.groups import Group
from nanogpt.report.plotting import (
    BASELINE,
    DASHES,
    GREY,
    SMALL,
    STRONG,
    WIDTH,
    Label,
    headed,
    label_ends,
    limits,
    looks,
    mark,
    trace,
)
from nanogpt.report.tables import shorten

PANEL = 2.9  # inches
NAME = 20  # letters at a curve's end
STEPS_NOTE = "steps: ± 95 % of the mean over seeds; k of n: so many reach it"
BAND = "bands: from the lowest seed to the highest"


def comparison_figure(
    groups: Sequence[Group],
    *,
    references: Sequence[Curve] = (),
    levels: Mapping[str, float] | None = None,
    target: tuple[str, float] | None = None,
    heading: tuple[str, str] = ("", ""),
    note: str = "",
    timed: bool = True,
) -> Figure:
    """Draws sets of runs, each by its mean and a band over its seeds.

    Published curves come from other machines, so they appear in the panel by step alone.

    Args:
        groups: the sets. Of one in which some runs diverged the others are drawn.
        references: published curves, drawn grey.
        levels: {label: loss} drawn as horizontal lines where they lie within the picture.
        target: what is to be reached, in words, and its loss; None: no panel of steps to it.
        heading: what the picture is about, and the lines below that.
        note: a line below the picture.
        timed: whether the runs' times mean the same; else there is no panel by time.
    """
    levels, columns = levels or {}, ["steps"]
    if timed and any(math.isfinite(x) and x for g in groups for x in g.shown.seconds):
        columns.append("seconds")
    heights = [PANEL * len(columns)] + [ROW * len(groups) + 0.55] * (target is not None)
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.75), layout="constrained")
    # Parts of their own: names of rows must not make the panels above them narrow.
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, column in zip(
        parts[0].subplots(len(columns), squeeze=False)[:, 0], columns, strict=True
    ):
        _panel(axes, groups, references if column == "steps" else (), column, levels, target)
    if target is not None:
        _steps(parts[-1].subplots(), groups, *target)
    headed(figure, *heading)
    if note:
        figure.supxlabel(note, color=GREY, fontsize=SMALL, parse_math=False)
    return figure


def _panel(
    axes: Axes,
    groups: Sequence[Group],
    references: Sequence[Curve],
    column: str,
    levels: Mapping[str, float],
    target: tuple[str, float] | None,
) -> None:
    lines = [group.shown for group in groups]
    goal = [] if target is None else [target[1]]
    low, high = limits([*lines, *references], [*levels.values(), *goal])
    labels = []
    for group, line, look in zip(groups, lines, looks([g.label for g in groups]), strict=True):
        (colour, dashes), lost = look, diverged(line)
        own = {"marker": "X" if lost else "o", "color": colour, "linestyle": dashes}
        x, y = trace(axes, line, group.survivors, column, **own)
        told = f"{y:.3f}" if column == "steps" else f"{x:.0f} s"
        name = shorten(line.label, NAME)
        labels.append(Label(name if lost else f"{name} {told}", x, y, colour))
    for line, dashes in zip(references, itertools.cycle(DASHES), strict=False):
        style: dict[str, Any] = {"color": GREY, "linestyle": dashes, "zorder": 2}
        end = trace(axes, line, (), column, linewidth=1.4, **style)
        labels.append(Label(f"{shorten(line.label, NAME)} {end[1]:.3f}", *end, GREY))
    ends = [float(x) for line in [*lines, *references] for x in getattr(line, column)]
    axes.set_xlim(0, 1.02 * max([0.0, *filter(math.isfinite, ends)]) or 1)
    axes.set_ylim(low, high)
    mark(axes, [*levels.values(), *goal])
    for name, loss in levels.items():
        if low < loss < high:
            place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
            axes.text(0.995, loss, f"{name} {loss:.3f}", color=GREY, fontsize=SMALL, **place)
    label_ends(axes, labels, 0.75 * PANEL)
    words = {"steps": "optimizer step", "seconds": "training time (seconds)"}
    axes.set(xlabel=words[column], ylabel="validation loss\n(nats per token)")


def _steps(axes: Axes, groups: Sequence[Group], name: str, target: float) -> None:
    rows = [
        steps_row(group, target, colour=colour)
        for group, (colour, _) in zip(groups, looks([g.label for g in groups]), strict=True)
    ]
    rows.sort(key=lambda row: (math.isnan(row.centre), row.centre))
    names = room(shorten(group.label) for group in groups)
    draw_dots(axes, rows, f"steps to {target:.3f}, {name}", WIDTH - names)


def steps_row(group: Group, target: float, *, colour: str, strong: bool = False) -> Row:
    """Steps of a set to a loss: of every run, and their mean with its interval if all reach it.

    Where some do not, the figure is that of the mean curve, as in the tables.
    """
    runs = [run for run in group.runs if len(run.steps) > 1] or [group.shown]
    reached = [x for run in runs if (x := steps_to_reach(run, target)) is not None]
    if len(reached) == len(runs):
        centre, reach = statistics.mean(reached), interval(reached)
        text = f"{centre:.0f}" + (f" ± {reach:.0f}" if math.isfinite(reach) else "")
    else:
        on_mean = steps_to_reach(group.shown, target)
        centre, reach = math.nan if on_mean is None else on_mean, math.nan
        text = "-" if on_mean is None else f"{centre:.0f}"
        text += f" ({len(reached)} of {len(runs)})" if reached else ""
    return Row(group.label, colour, reached, float(centre), reach, text, strong)


def training_figure(
    records: Sequence[Mapping[str, Any]], curve: Curve, heading: tuple[str, str]
) -> Figure:
    """Draws what a run recorded of its training: losses, learning rate, norm of the gradient.

    Args:
        records: its records of kind "train".
        curve: its validations.
        heading: as of `comparison_figure`.
    """
    figure = Figure(figsize=(WIDTH, PANEL + 2 * 1.6 + 0.75), layout="constrained")
    panels = figure.subplots(3, 1, height_ratios=[PANEL, 1.6, 1.6], sharex=True)
    steps = [record["step"] for record in records]
    for axes, name in zip(panels, ("loss", "learning_rate", "grad_norm"), strict=True):
        values = [record.get(name) for record in records]
        values = np.array([math.nan if x is None else x for x in values], float)
        axes.plot(steps, values, color=GREY if name == "loss" else BASELINE, linewidth=1.3)
        axes.set_ylabel({"loss": "loss (nats per token)"}.get(name, name.replace("_", " ")))
    end = trace(panels[0], curve, (), "steps", color=STRONG)
    told = Label("validation" if diverged(curve) else f"validation {end[1]:.3f}", *end, STRONG)
    trained = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    last = Label("training", *trained[-1], GREY) if trained else None
    losses = [loss for _, loss in trained]
    points = Curve("training", [step for step, _ in trained] or [0], losses or [math.nan], losses)
    panels[0].set_ylim(*limits([curve, points]))
    label_ends(panels[0], [told, last] if last else [told], 0.75 * PANEL)
    panels[-1].set_xlabel("optimizer step")
    headed(figure, *heading)
    return figure
