"""The picture of a comparison: validation loss by step and by training time."""

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from nanogpt.report.curves import Curve

# Okabe and Ito's colours, told apart by every kind of colour vision; yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#767676"
DASHES = ((0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 2)))
STYLE = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
}


def draw(
    path: pathlib.Path,
    lines: Sequence[Curve],
    references: Sequence[Curve] = (),
    baselines: Mapping[str, float] | None = None,
    *,
    note: str = "",
    timed: bool = True,
) -> None:
    """Draws the picture.

    Published curves come from other machines, so they appear in the panel by step alone.

    Args:
        path: PNG file to write.
        lines: the runs.
        references: published curves, drawn grey behind them.
        baselines: {label: loss} drawn as horizontal lines.
        note: a line below the picture.
        timed: whether the runs' times mean the same; else the panel by time says why it is empty.
    """
    baselines = baselines or {}
    low, high = limits(lines, references, baselines)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.5, 5.6), dpi=110, layout="constrained")
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        for axes, column in ((by_step, "steps"), (by_time, "seconds")):
            if timed or column == "steps":
                _draw_runs(axes, lines, column)
            _draw_baselines(axes, baselines)
            axes.set_ylim(low, high)
        _draw_references(by_step, references)
        # Explicit: what diverged is not drawn, but its label needs its place on the axis.
        by_step.set_xlim(0, 1.05 * max(line.steps[-1] for line in [*lines, *references]) or 1)
        by_time.set_xlim(0, 1.05 * max(line.seconds[-1] for line in lines) or 1)
        by_step.set(xlabel="optimizer step", ylabel="validation loss (nats per token)")
        by_time.set(xlabel="training time (seconds)")
        if not timed:
            middle = {"transform": by_time.transAxes, "ha": "center", "color": GREY}
            by_time.text(0.5, 0.5, "different hosts or devices: times left out", **middle)
        if note:
            figure.supxlabel(note, color=GREY, fontsize=11)
        _label_ends(by_step, lines)
        _label_baselines(by_time, baselines)
        figure.legend(
            *by_step.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False
        )
        figure.savefig(path)


def limits(
    lines: Sequence[Curve], references: Sequence[Curve], baselines: Mapping[str, float]
) -> tuple[float, float]:
    """Returns the losses between which the picture is drawn.

    The first steps fall from ln(vocabulary) so fast that showing them would squeeze the end, where
    runs differ: the top is a little above what the worst run has reached after a tenth of its
    steps, or above the highest baseline. Losses that are not finite do not count.
    """
    measured = [
        (loss, step >= 0.1 * curve.steps[-1])
        for curve in [*lines, *references]
        for step, loss in zip(curve.steps, curve.losses, strict=True)
        if np.isfinite(loss)
    ]
    levels = [*baselines.values()]
    lowest = min([loss for loss, _ in measured] + levels, default=0.0)
    # A run that diverged in its first tenth has nothing but its beginning.
    late = [loss for loss, is_late in measured if is_late] or [loss for loss, _ in measured]
    highest = max(late + levels, default=1.0)
    margin = 0.05 * (highest - lowest) or 0.05
    return float(lowest - margin), float(highest + margin)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Moves positions apart until neighbours are `gap` apart, keeping order and centre.

    >>> spread([1.0, 1.0, 5.0], gap=1.0)
    [0.5, 1.5, 5.0]
    """
    order = np.argsort(positions, kind="stable")
    groups: list[list[float]] = []
    for position in np.asarray(positions, float)[order]:
        groups.append([position, 1])
        while len(groups) > 1 and _touch(groups[-2], groups[-1], gap):
            (a, m), (b, n) = groups[-2:]
            groups[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    moved = [c + gap * (i - (n - 1) / 2) for c, n in groups for i in range(int(n))]
    result = [0.0] * len(moved)
    for place, value in zip(order, moved, strict=True):
        result[place] = float(value)
    return result


def _touch(lower: list[float], upper: list[float], gap: float) -> bool:
    """Whether two groups [centre, count] of spread positions overlap."""
    return upper[0] - lower[0] < gap * (lower[1] + upper[1]) / 2


def _draw_runs(axes: Axes, lines: Sequence[Curve], column: str) -> None:
    for index, line in enumerate(lines):
        x, colour = getattr(line, column), COLOURS[index % len(COLOURS)]
        axes.plot(x, line.losses, color=colour, linewidth=2.2, label=line.label, zorder=3)
        axes.plot(x[-1:], line.losses[-1:], "o", color=colour, markersize=6, zorder=4)


def _draw_baselines(axes: Axes, baselines: Mapping[str, float]) -> None:
    for loss in baselines.values():
        axes.axhline(loss, color=GREY, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)


def _label_baselines(axes: Axes, baselines: Mapping[str, float]) -> None:
    """Names the baselines right of the panel, where no curve can cross them."""
    low, high = axes.get_ylim()
    places = spread(list(baselines.values()), gap=0.1 * (high - low))
    for (label, loss), place in zip(baselines.items(), places, strict=True):
        axes.annotate(
            f"{label}\n{loss:.3f}",
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            color=GREY,
            fontsize=12,
        )


def _draw_references(axes: Axes, references: Sequence[Curve]) -> None:
    for index, line in enumerate(references):
        dashes = DASHES[index % len(DASHES)]
        axes.plot(line.steps, line.losses, color=GREY, linestyle=dashes, label=line.label, zorder=2)


def _label_ends(axes: Axes, lines: Sequence[Curve]) -> None:
    """Writes each run's final loss at its right end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    # A run that diverged has no end to write at: its label goes to the top.
    finals = [line.losses[-1] if np.isfinite(line.losses[-1]) else high for line in lines]
    places = spread(finals, gap=0.045 * (high - low))
    for index, (line, place) in enumerate(zip(lines, places, strict=True)):
        loss = line.losses[-1]
        axes.annotate(
            f"{line.label} {loss:.3f}" if np.isfinite(loss) else f"{line.label} diverged",
            (line.steps[-1], place),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS[index % len(COLOURS)],
            annotation_clip=False,
            fontsize=12,
            fontweight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
