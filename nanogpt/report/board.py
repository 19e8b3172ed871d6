"""A leaderboard: its table, and its picture: dots for what came out, curves for the way there."""

import math
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanogpt.report.curves import Curve, common_steps, steps_to_reach
from nanogpt.report.dots import ROW, Row, draw_dots, room
from nanogpt.report.figures import STEPS_NOTE, steps_row
from nanogpt.report.groups import Group
from nanogpt.report.plotting import (
    BASELINE,
    DASHES,
    GREY,
    STRONG,
    WIDTH,
    Label,
    headed,
    label_ends,
    mark,
    save,
    trace,
)
from nanogpt.report.tables import shorten, shown, table

CURVES, NAMES, DOTS = 3.4, 1.4, 0.9  # inches: of curves, of the rows' names, of dots at least
# Of the steps: before the first part differences are those of the first fall, before the second
# losses say little about the end.
SETTLED, LATE = 0.2, 0.5
NAMED = 8  # emphasised curves that have their names at their ends
FINE = 0.05  # nats between the best and the worst, below which four digits are written
LONGEST = 1.8  # of the median length, where curves are cut lest one slow one squeeze the others

Columns = Mapping[str, Callable[[Group], str]]


def board_table(
    groups: Sequence[Group], *, target: float | None = None, extra: Columns | None = None
) -> str:
    """Returns the table in Markdown, one row a group, in the order given.

    Every group is read at its last step that all its runs have.

    Args:
        groups: the rows.
        target: loss for the column "steps to TARGET", read from the mean curve by linear
            interpolation; None leaves the column out.
        extra: further columns, {title: function from a group to its cell}.

    Raises:
        ValueError: a group without a step that all its runs have; names it.
    """
    columns: dict[str, Callable[[Group], str]] = {
        "optimizer": lambda group: group.label,
        "n": lambda group: str(len(group.runs)),
        "steps": lambda group: str(group.result.step),
        "final loss": lambda group: f"{group.result.mean:.4f}",
        "std": lambda group: shown(group.result.std, ".4f"),
    }
    if target is not None:
        reach = f"steps to {target:.4f}".rstrip("0")
        columns[reach] = lambda group: shown(steps_to_reach(group.curve, target), ".0f")
    columns["step time (ms)"] = lambda group: shown(group.seconds_per_step, ".0f", 1e3)
    if any(group.flops_per_step for group in groups):
        columns["TFLOP per step"] = lambda group: shown(group.flops_per_step, ".4g", 1e-12)
    return table({**columns, **(extra or {})}, groups)


def draw_board(
    groups: Sequence[Group],
    out_dir: pathlib.Path | str,
    *,
    target: float | None = None,
    baseline: str = "",
    heading: tuple[str, str] = ("", ""),
    machine: str = "",
    name: str = "leaderboard",
) -> pathlib.Path:
    """Draws the groups: name.png, and name-dark.png for dark pages; see `board_figure`.

    Returns:
        Path of the first one.

    Raises:
        ValueError: no groups, or one without a step that all its runs have.
    """
    if not groups:
        raise ValueError("no groups to draw: a leaderboard needs at least one.")
    for group in groups:
        group.result  # noqa: B018 (raises before anything is written)
    path = pathlib.Path(out_dir) / f"{name}.png"
    options = {"target": target, "baseline": baseline, "heading": heading, "machine": machine}
    return save(path, lambda: board_figure(groups, **options))


def board_figure(
    groups: Sequence[Group],
    *,
    target: float | None = None,
    baseline: str = "",
    heading: tuple[str, str] = ("", ""),
    machine: str = "",
) -> Figure:
    """Draws a row a group, and below their curves by step.

    Groups of Shampoo are emphasised, and beside published results those that are not. The others'
    curves are grey, the best one of them has its name.

    Args:
        groups: at least one, in the order of the rows.
        target: loss; a column has the steps to it.
        baseline: label of a group; curves are drawn less its curve, beside losses stands what they
            are less its loss. Empty: as they are.
        heading: what the picture is about, and the lines below that.
        machine: named where times are drawn. Groups that are not `timed` have none.
    """
    columns = {
        label: rows
        for label, rows in _columns(groups, target, baseline).items()
        if any(math.isfinite(row.centre) or row.values for row in rows)
    }
    heights = [ROW * len(groups) + 0.7, CURVES]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.9), layout="constrained")
    top, bottom = figure.add_gridspec(2, 1, height_ratios=heights)
    wanted = [DOTS + room(row.text for row in rows) for rows in columns.values()] or [1.0]
    widths = [(WIDTH - NAMES) * part / sum(wanted) for part in wanted]
    places = top.subgridspec(1, len(wanted), width_ratios=widths)
    for k, (label, rows) in enumerate(columns.items()):
        draw_dots(figure.add_subplot(places[k]), rows, label, widths[k], named=k == 0)
    low = figure.add_subplot(bottom)
    _curves(low, groups, target, baseline)
    several = any(len(group.runs) > 1 for group in groups)
    notes = [f"times: {shorten(machine, 60)}"] * bool(machine)
    notes += ["losses: ± std between runs", STEPS_NOTE] * several
    headed(figure, heading[0], "\n".join([heading[1], *notes]))
    return figure


def _emphasis(groups: Sequence[Group], baseline: str) -> list[tuple[str, bool]]:
    """Colour of every group, and whether it is emphasised."""
    published = any(group.reference for group in groups)
    found = []
    for group in groups:
        strong = "shampoo" in group.label.lower() or (published and not group.reference)
        colour = BASELINE if group.label == baseline else STRONG if strong else GREY
        found.append((colour, strong))
    return found


def _columns(groups: Sequence[Group], target: float | None, baseline: str) -> dict[str, list[Row]]:
    """{label of the axis: rows}."""
    base = next((group.result for group in groups if group.label == baseline), None)
    styles, losses, steps, times = _emphasis(groups, baseline), [], [], []
    means = [group.result.mean for group in groups if math.isfinite(group.result.mean)]
    digits = 4 if means and max(means) - min(means) < FINE else 3
    for group, (colour, strong) in zip(groups, styles, strict=True):
        result = group.result
        ends = [run.losses[run.steps.index(result.step)] for run in group.survivors]
        text = f"{result.mean:.{digits}f}"
        if base and result.step == base.step and group.label != baseline:
            text = f"{result.mean - base.mean:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
        if len(ends) < len(group.runs):
            lost = f"{len(group.runs) - len(ends)} of {len(group.runs)} "
            text = lost * bool(ends) + "diverged"
        losses.append(Row(group.label, colour, ends, result.mean, result.std, text, strong))
        if target is not None:
            steps.append(steps_row(group, target, colour=colour, strong=strong))
        seconds = group.shown.seconds[-1] if group.timed else math.nan
        text = shown(seconds, ".0f" if seconds > 10 else ".1f")
        times.append(Row(group.label, colour, (), seconds, math.nan, text, strong))
    compared = f", less {baseline}'s" if base else ""
    return {
        f"final loss{compared}": losses,
        "" if target is None else f"steps to {target:.3f}": steps,
        "time (s)": times,
    }


def _curves(axes: Axes, groups: Sequence[Group], target: float | None, baseline: str) -> None:
    base = next((g for g in groups if g.label == baseline and g.survivors), None)
    styles, labels, count = _emphasis(groups, baseline), [], 0
    ranked = sorted(zip(groups, styles, strict=True), key=lambda pair: _rank(pair[0], target))
    named = [group for group, (_, strong) in ranked if strong][:NAMED]
    named += [g for g, (colour, _) in ranked if colour == GREY][:1] + ([base] if base else [])
    drawn = [_less(group.shown, base) for group in groups]
    for group, curve, (colour, strong) in zip(groups, drawn, styles, strict=True):
        style: dict[str, Any] = {"color": colour, "linewidth": 2.0, "zorder": 4}
        if strong:
            style["linestyle"] = ("-", *DASHES)[count % (1 + len(DASHES))]
            count += 1
        elif colour == GREY:
            style |= {"linewidth": 1.0, "zorder": 2, "alpha": 0.9}
        runs = [_less(run, base) for run in group.survivors] if colour != GREY else ()
        end = trace(axes, curve, runs, "steps", **style)
        if any(group is one for one in named):
            labels.append(Label(shorten(group.label), *end, colour))
    if base is None:
        axes.set_ylim(*_between(drawn, LATE))
        mark(axes, [] if target is None else [target])
        axes.set_ylabel("validation loss\n(nats per token)")
    else:
        axes.set_ylim(*_between(drawn, SETTLED))
        axes.set_ylabel(f"validation loss less {baseline}'s\n(nats per token)")
    ends = [curve.steps[-1] for curve in drawn if len(curve.steps)] or [1]
    middle = statistics.median(ends)
    axes.set_xlim(SETTLED * middle, min(1.02 * max(ends), LONGEST * middle) or 1)
    axes.set_xlabel("optimizer step")
    label_ends(axes, labels, 0.8 * CURVES)


def _rank(group: Group, target: float | None) -> float:
    """What is best is first at the target, or lowest where nothing reaches it."""
    reached = None if target is None else steps_to_reach(group.shown, target)
    loss = group.shown.losses[-1]
    return reached if reached is not None else 1e9 + (loss if math.isfinite(loss) else 1e9)


def _less(curve: Curve, base: Group | None) -> Curve:
    """A curve less that of the baseline, at the steps that both have."""
    if base is None:
        return curve
    steps = common_steps([curve, base.shown])
    its, own = ([c.steps.index(step) for step in steps] for c in (base.shown, curve))
    pairs = zip(its, own, strict=True)
    losses = [curve.losses[k] - base.shown.losses[i] for i, k in pairs]
    return Curve(curve.label, steps, losses, [curve.seconds[k] for k in own])


def _between(curves: Sequence[Curve], begin: float) -> tuple[float, float]:
    """Lowest and highest loss after a part of each curve, with a margin."""
    late = [
        loss
        for curve in curves
        for step, loss in zip(curve.steps, curve.losses, strict=True)
        if step >= begin * curve.steps[-1] and math.isfinite(loss)
    ] or [0.0]
    margin = 0.05 * (max(late) - min(late)) or 0.05
    return min(late) - margin, max(late) + margin
