"""A leaderboard: its table, and its picture by step, by time and by operations."""

import math
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanogpt.report.curves import Curve, steps_to_reach
from nanogpt.report.groups import Group
from nanogpt.report.plotting import COLOURS, STYLE, limits, mark, trace
from nanogpt.report.tables import shown, table

# Of a family's curves one after the other; after as many families as there are colours, too.
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (10, 2)))
# What the final stretch shows of each curve.
FINAL_STRETCH = 0.1
# It ends at this multiple of the median length, lest one slow curve squeeze the others together.
LONGEST = 1.3

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
    title: str = "",
    machine: str = "",
    name: str = "leaderboard",
) -> pathlib.Path:
    """Draws the groups by step, by training time and by operations, and the end enlarged.

    Args:
        groups: at least one. Those that are not `timed`, or whose `flops_per_step` is None, are
            left out of the panel that needs it; a panel without curves is left out.
        out_dir: folder of the picture; created if missing.
        target: loss drawn as a horizontal line.
        title: above the picture.
        machine: named where times are drawn.
        name: of the picture, name.png.

    Returns:
        Path of the picture.

    Raises:
        ValueError: no groups, or one without a step that all its runs have.
    """
    if not groups:
        raise ValueError("no groups to draw: a leaderboard needs at least one.")
    curves = [group.curve for group in groups if group.result]
    low, high = limits(curves, _levels(target))
    panels = {
        label: placed
        for label, place in _panels(machine).items()
        if any(placed := [place(*pair) for pair in zip(groups, curves, strict=True)])
    }
    path = pathlib.Path(out_dir) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        rows = math.ceil((len(panels) + 1) / 2)
        figure = Figure(figsize=(15, 5.2 * rows + 0.6), dpi=90, layout="constrained")
        axes = figure.subplots(rows, 2, squeeze=False).flatten()
        for place, (label, placed) in zip(axes, panels.items(), strict=False):
            _draw(place, groups, curves, placed, target)
            place.set(xlabel=label, ylim=(low, high), xlim=(0, None))
        _draw_final_stretch(axes[len(panels)], groups, curves, target)
        for place in axes[len(panels) + 1 :]:
            place.remove()
        for place in axes[: len(panels) + 1 : 2]:
            place.set_ylabel("validation loss (nats per token)")
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(title)
        figure.savefig(path)
    return path


Position = Sequence[float]  # of a curve's points on a panel's horizontal axis; empty: not drawn


def _panels(machine: str) -> dict[str, Callable[[Group, Curve], Position]]:
    """What each panel's horizontal axis is, and where a curve lies on it."""
    return {
        "optimizer step": lambda group, curve: curve.steps,
        f"training time{machine and f' on {machine}'} (seconds)": lambda group, curve: (
            curve.seconds if group.timed and math.isfinite(curve.seconds[-1]) else ()
        ),
        "operations (FLOP)": lambda group, curve: (
            [step * group.flops_per_step for step in curve.steps] if group.flops_per_step else ()
        ),
    }


def _draw(
    axes: Axes,
    groups: Sequence[Group],
    curves: Sequence[Curve],
    placed: Sequence[Position],
    target: float | None,
) -> None:
    for group, curve, x, style in zip(groups, curves, placed, _styles(groups), strict=True):
        if len(x):
            trace(axes, x, curve.losses, label=group.label, **style)
    mark(axes, _levels(target))


def _draw_final_stretch(
    axes: Axes, groups: Sequence[Group], curves: Sequence[Curve], target: float | None
) -> None:
    """By step again, from where the first curve begins its last tenth to where most have ended."""
    _draw(axes, groups, curves, [curve.steps for curve in curves], target)
    late = [
        (step, loss)
        for curve in curves
        for step, loss in zip(curve.steps, curve.losses, strict=True)
        if step >= (1 - FINAL_STRETCH) * curve.steps[-1] and math.isfinite(loss)
    ]
    if late:
        steps, losses = zip(*late, strict=True)
        levels = [*losses, *_levels(target)]
        margin = 0.05 * (max(levels) - min(levels)) or 0.05
        ends = [curve.steps[-1] for curve in curves]
        right = min(1.02 * max(ends), LONGEST * statistics.median(ends))
        axes.set(xlim=(min(steps), right), ylim=(min(levels) - margin, max(levels) + margin))
    axes.set(xlabel="optimizer step, the end enlarged")


def _styles(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Colour, dashes and width of every group."""
    families = [group.family or group.label for group in groups]
    order, styles = list(dict.fromkeys(families)), []
    for index, (family, group) in enumerate(zip(families, groups, strict=True)):
        turn, colour = divmod(order.index(family), len(COLOURS))
        dashes = DASHES[(turn + families[:index].count(family)) % len(DASHES)]
        width = 1.4 if group.reference else 2.2
        styles.append({"color": COLOURS[colour], "linestyle": dashes, "linewidth": width})
    return styles


def _levels(target: float | None) -> list[float]:
    return [] if target is None else [target]
