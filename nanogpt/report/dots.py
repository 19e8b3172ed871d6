"""Dot plots: a row a setting, a dot a run, a line for the interval, the figure beside it."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from nanogpt.report.plotting import SMALL
from nanogpt.report.tables import shorten

# Student's t of 95 %, two-sided, by degrees of freedom.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
NORMAL95 = 1.96
LETTER = 0.62 * SMALL / 72  # inches, of a figure's
ROW, TICK = 0.29, 0.5  # inches between rows, and between figures on the axis at least


class Row(NamedTuple):
    """A row.

    Attributes:
        label: what it is about.
        colour: of its dots.
        values: of its runs.
        centre: its figure, nan where there is none.
        reach: how far the line goes on both sides, nan where there is none.
        text: the figure as it is written.
        strong: whether it is emphasised.
    """

    label: str
    colour: str
    values: Sequence[float]
    centre: float
    reach: float
    text: str
    strong: bool = False


def interval(values: Sequence[float]) -> float:
    """Returns half of the 95 % interval of the mean by Student's t; nan of a single value.

    >>> round(interval([240.0, 250.0, 260.0]), 1)
    24.8
    """
    n = len(values)
    if n < 2:
        return math.nan
    factor = T95[n - 2] if n - 2 < len(T95) else NORMAL95
    return factor * statistics.stdev(values) / math.sqrt(n)


def room(words: Iterable[str]) -> float:
    """Inches that the longest of some words takes."""
    return LETTER * (1.5 + max(map(len, words), default=0))


def draw_dots(
    axes: Axes, rows: Sequence[Row], label: str, width: float, *, named: bool = True
) -> None:
    """Draws rows from top to bottom.

    Args:
        axes: the panel.
        rows: in order.
        label: of the horizontal axis.
        width: of the panel in inches, about; the figures take their part of it.
        named: whether the rows' names stand left of it.
    """
    for place, row in enumerate(rows):
        style = {"color": row.colour, "zorder": 3}
        axes.plot(row.values, [place] * len(row.values), "o", markersize=3, alpha=0.55, **style)
        if math.isfinite(row.centre):
            axes.plot(row.centre, place, "o", markersize=7 if row.strong else 5.5, **style)
        if math.isfinite(row.reach):
            ends = row.centre - row.reach, row.centre + row.reach
            axes.plot(ends, [place] * 2, linewidth=2.4 if row.strong else 1.6, **style)
    found = [x for row in rows for x in (*row.values, row.centre) if math.isfinite(x)] or [0.0]
    # An interval that leaves the panel is cut: that of two runs is enormous.
    wide = max(found) - min(found) or 0.1 * abs(found[0]) or 1.0
    reach = min(max((r.reach for r in rows if math.isfinite(r.reach)), default=0.0), wide)
    left, right = min(found) - max(reach, 0.06 * wide), max(found) + max(reach, 0.06 * wide)
    part = min(room(row.text for row in rows) / width, 0.7)
    axes.set_xlim(left, left + (right - left) / (1 - part))
    for place, row in enumerate(rows):
        weight = "bold" if row.strong else "normal"
        edge = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center_baseline"}
        axes.text(1, place, row.text, fontsize=SMALL, fontweight=weight, **edge)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    few = max(2, int((1 - part) * width / TICK))
    ticks = MaxNLocator(nbins=few, steps=[1, 2, 5, 10]).tick_values(left, right)
    ticks = [tick for tick in ticks if left <= tick <= right]
    axes.set_xticks(ticks[:: math.ceil(len(ticks) / few) or 1])
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.set_xlabel(label, fontsize=SMALL, parse_math=False)
    if named:
        _name(axes, rows)
    else:
        axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _name(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_yticks(range(len(rows)), [shorten(r.label) for r in rows], fontsize=SMALL)
    for text, row in zip(axes.get_yticklabels(), rows, strict=True):
        text.set_parse_math(False)
        text.set_color(row.colour if row.strong else matplotlib.rcParams["text.color"])
        text.set_fontweight("bold" if row.strong else "normal")
