"""The picture of a comparison: validation loss by step and by training time."""

import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
    low, high = limits([*lines, *references], baselines.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.5, 5.6), dpi=110, layout="constrained")
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        for axes, column in ((by_step, "steps"), (by_time, "seconds")):
            shown = lines if timed or axes is by_step else ()
            for line, colour in zip(shown, itertools.cycle(COLOURS), strict=False):
                x, style = getattr(line, column), {"linewidth": 2.2, "zorder": 3}
                trace(axes, x, line.losses, color=colour, label=line.label, **style)
            mark(axes, baselines.values())
            axes.set_ylim(low, high)
        for line, dashes in zip(references, itertools.cycle(DASHES), strict=False):
            style = {"color": GREY, "linestyle": dashes, "zorder": 2}
            by_step.plot(line.steps, line.losses, label=line.label, **style)
        # Explicit: what diverged is not drawn, but its label needs its place on the axis.
        by_step.set_xlim(0, 1.05 * max(line.steps[-1] for line in [*lines, *references]) or 1)
        seconds = [0.0, *(x for line in lines for x in line.seconds if np.isfinite(x))]
        by_step.set(xlabel="optimizer step", ylabel="validation loss (nats per token)")
        by_time.set(xlabel="training time (seconds)", xlim=(0, 1.05 * max(seconds) or 1))
        if not timed:
            middle = {"transform": by_time.transAxes, "ha": "center", "color": GREY}
            by_time.text(0.5, 0.5, "different hosts or devices: times left out", **middle)
        if note:
            figure.supxlabel(note, color=GREY, fontsize=11)
        _label_ends(by_step, lines)
        names = [(f"{name}\n{loss:.3f}", 1.0, loss, GREY) for name, loss in baselines.items()]
        _label(by_time, names, 0.1, xycoords=("axes fraction", "data"))
        figure.legend(
            *by_step.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False
        )
        figure.savefig(path)


def limits(lines: Sequence[Curve], levels: Iterable[float] = ()) -> tuple[float, float]:
    """Returns the losses between which the picture is drawn.

    The first steps fall from ln(vocabulary) so fast that showing them would squeeze the end, where
    runs differ: the top is a little above what the worst run has reached after a tenth of its
    steps, or above the highest of `levels`. Losses that are not finite do not count.
    """
    measured = [
        (loss, step >= 0.1 * curve.steps[-1])
        for curve in lines
        for step, loss in zip(curve.steps, curve.losses, strict=True)
        if np.isfinite(loss)
    ]
    levels = list(levels)
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
    places = np.asarray(positions, float)[order]
    for _ in range(1000):
        missing = np.maximum(gap - np.diff(places), 0) / 2
        places[:-1] -= missing
        places[1:] += missing
    return places[np.argsort(order)].tolist()


def trace(axes: Axes, x: Sequence[float], losses: Sequence[float], **style: Any) -> None:
    """Draws a run's curve, and a dot where it ends."""
    axes.plot(x, losses, **style)
    axes.plot(x[-1:], losses[-1:], "o", color=style["color"], markersize=6, zorder=4)


def mark(axes: Axes, levels: Iterable[float]) -> None:
    """Draws losses as horizontal lines."""
    for level in levels:
        axes.axhline(level, color=GREY, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)


def _label_ends(axes: Axes, lines: Sequence[Curve]) -> None:
    """Writes each run's final loss at its right end; at the top if it diverged and has none."""
    texts = []
    for line, colour in zip(lines, itertools.cycle(COLOURS), strict=False):
        step, loss = line.steps[-1], line.losses[-1]
        if np.isfinite(loss):
            texts.append((f"{line.label} {loss:.3f}", step, loss, colour))
        else:
            texts.append((f"{line.label} diverged", step, axes.get_ylim()[1], colour))
    halo = [withStroke(linewidth=3, foreground="white")]
    _label(axes, texts, 0.045, fontweight="bold", path_effects=halo)


def _label(
    axes: Axes, texts: Sequence[tuple[str, float, float, str]], gap: float, **style: Any
) -> None:
    """Writes (text, x, y, colour) right of x, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    heights = spread([y for _, _, y, _ in texts], gap * (high - low))
    style |= {"xytext": (9, 0), "textcoords": "offset points", "va": "center", "fontsize": 12}
    for (text, x, _, colour), y in zip(texts, heights, strict=True):
        axes.annotate(text, (x, y), color=colour, annotation_clip=False, **style)
