"""What pictures are made of: styles of light and dark pages, curves with bands, labels, dots.

A picture is six inches wide, so that its words can be read on a telephone, where that is all the
width there is.
"""

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from nanogpt.report.curves import Curve, common_steps, diverged
from nanogpt.report.tables import printable

# Okabe and Ito's colours, told apart by every kind of colour vision; yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#7d7d7d"  # between both
DASHES = ((0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 2)))
WIDTH = 6.0  # inches
SMALL = 9.5  # points
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "savefig.dpi": 160,
}
INKS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
PAPERS = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")


class Paper(NamedTuple):
    """Colours of a page; those of curves stand out of it by a contrast of 3 and more."""

    ink: str
    page: str
    grid: str
    curves: tuple[str, ...]

    @property
    def style(self) -> dict[str, Any]:
        """Settings of matplotlib; there curves are "C0", "C1" and so on."""
        neutral = dict.fromkeys(INKS, self.ink) | dict.fromkeys(PAPERS, self.page)
        cycle = {"axes.prop_cycle": cycler(color=self.curves)}
        return STYLE | neutral | cycle | {"grid.color": self.grid}


# Their curves are Okabe and Ito's, in the same order of hues; of black SVG says nothing, which a
# dark page could replace, so it is almost black.
LIGHT = Paper(
    "#1f2328", "#ffffff", "#e6e6e6", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#111111")
)
DARK = Paper(
    "#e6edf3", "#0d1117", "#30363d", ("#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#F0E442")
)
BASELINE, STRONG = "C0", "C1"  # AdamW's, Shampoo's
OTHERS = {f"C{k}" for k in range(2, len(LIGHT.curves))}
STYLES = [(f"C{k}", dash) for dash in ("-", *DASHES) for k in range(len(LIGHT.curves))]


def looks(labels: Sequence[str]) -> list[tuple[str, Any]]:
    """Colour and dashes of curves; AdamW and Shampoo have a colour that no other one has.

    >>> looks(["Muon", "AdamW", "Shampoo", "shampoo_third"])[:3]
    [('C2', '-'), ('C0', '-'), ('C1', '-')]
    """
    left, found = list(STYLES), []
    for label in map(str.lower, labels):
        own = {BASELINE} if "adamw" in label else {STRONG} if "shampoo" in label else OTHERS
        found.append(next((look for look in left if look[0] in own), left[0]))
        left.remove(found[-1])
    return found


def save(path: pathlib.Path, make: Callable[[], Figure]) -> pathlib.Path:
    """Draws a picture for light pages, path, and one for dark ones, path-dark.

    Args:
        path: PNG file to write; its folder is made if it is not there.
        make: makes the figure, in the colours of matplotlib's settings.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for page, name in ((LIGHT, path.name), (DARK, f"{path.stem}-dark{path.suffix}")):
        with matplotlib.rc_context(page.style):
            make().savefig(path.with_name(name))
    return path


def limits(lines: Sequence[Curve], levels: Iterable[float] = ()) -> tuple[float, float]:
    """Returns the losses between which the picture is drawn.

    The first steps fall from ln(vocabulary) so fast that showing them would squeeze the end, where
    runs differ: the top is a little above what the worst run has reached after a tenth of its
    steps. Of `levels` those below it are shown. Runs that diverged, where others did not, and
    losses that are not finite do not count.
    """
    measured = [
        (loss, step >= 0.1 * curve.steps[-1])
        for curve in [line for line in lines if not diverged(line)] or lines
        for step, loss in zip(curve.steps, curve.losses, strict=True)
        if np.isfinite(loss)
    ]
    late = [loss for loss, is_late in measured if is_late]
    # A run that diverged at once, or was hardly validated, has nothing but its beginning.
    late = late if len(late) > len(lines) else [loss for loss, _ in measured]
    levels = list(levels)
    highest = max(late, default=max(levels, default=1.0))
    lowest = min([*(loss for loss, _ in measured), *levels], default=0.0)
    margin = 0.05 * (highest - lowest) or 0.05
    return float(lowest - margin), float(highest + margin)


def spread(
    positions: Sequence[float], gap: float, low: float = -np.inf, high: float = np.inf
) -> list[float]:
    """Moves positions apart until neighbours are `gap` apart, keeping order and, if it can, centre.

    They stay between `low` and `high`; where these are too close, neighbours are closer, too.

    >>> spread([1.0, 1.0, 5.0], gap=1.0)
    [0.5, 1.5, 5.0]
    >>> spread([1.0, 1.0, 5.0], gap=1.0, low=1.0)
    [1.0, 2.0, 5.0]
    """
    order = np.argsort(positions, kind="stable")
    gap = min(gap, (high - low) / max(len(order) - 1, 1))
    steps = gap * np.arange(len(order))
    # Less these steps, places may not fall: where positions do, all of them go to their mean.
    pools: list[list[float]] = []
    for position in np.asarray(positions, float)[order] - steps:
        pools.append([float(position)])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    levels = np.concatenate([np.full(len(pool), np.mean(pool)) for pool in pools or [[]]])
    places = np.clip(levels, low, high - gap * max(len(order) - 1, 0)) + steps
    return places[np.argsort(order)].tolist()


def trace(
    axes: Axes, curve: Curve, runs: Sequence[Curve], column: str, marker: str = "o", **style: Any
) -> tuple[float, float]:
    """Draws a mean curve, a mark where it ends, and a band from the lowest run to the highest.

    Returns:
        Where it ends: its last point of which the loss is finite.
    """
    x, losses = np.array(getattr(curve, column), float), np.array(curve.losses, float)
    drawn: dict[str, Any] = {"linewidth": 2.2, "zorder": 3} | style
    axes.plot(x, losses, **drawn)
    if len(runs) > 1 and list(curve.steps) == common_steps(runs):
        found = [[run.losses[run.steps.index(step)] for step in curve.steps] for run in runs]
        colours = {"color": style["color"], "alpha": 0.18, "linewidth": 0, "zorder": 2}
        axes.fill_between(x, np.min(found, 0), np.max(found, 0), **colours)
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(losses))
    if not known.size:
        return 0.0, np.inf
    end = float(x[known[-1]]), float(losses[known[-1]])
    axes.plot(*end, marker, color=style["color"], markersize=5, zorder=4)
    return end


def mark(axes: Axes, levels: Iterable[float]) -> None:
    """Draws losses as horizontal lines."""
    for level in levels:
        axes.axhline(level, color=GREY, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)


class Label(NamedTuple):
    """A word for a curve's end."""

    text: str
    x: float
    y: float
    colour: str


def label_ends(axes: Axes, labels: Sequence[Label], height: float) -> None:
    """Writes labels right of a panel, a thin line from each to its curve's end.

    Args:
        axes: the panel, its limits set.
        labels: of curves; those that end outside of the panel have theirs at its edge.
        height: of the panel in inches, from which follows how close labels may be.
    """
    (low, high), across = axes.get_ylim(), axes.get_xlim()
    gap = 1.3 * SMALL / 72 / height * (high - low)
    ends = [float(np.clip(label.y, low, high)) for label in labels]
    places = spread(ends, gap, low + gap / 2, high - gap / 2)
    style: dict[str, Any] = {"fontsize": SMALL, "fontweight": "bold", "va": "center"}
    style |= {"annotation_clip": False, "parse_math": False}
    for label, end, place in zip(labels, ends, places, strict=True):
        line = {"arrowstyle": "-", "color": label.colour, "alpha": 0.5, "shrinkA": 1, "shrinkB": 4}
        axes.annotate(
            label.text, (float(np.clip(label.x, *across)), end), (1.02, place),
            textcoords=("axes fraction", "data"), color=label.colour,
            arrowprops=line | {"linewidth": 0.8, "relpos": (0, 0.5)}, **style,
        )  # fmt: skip


def say(axes: Axes, text: str) -> None:
    """Writes in the middle of a panel that has nothing to show."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=GREY)


def headed(figure: Figure, head: str, lines: str) -> None:
    """Writes above a picture what it is about, and the rest smaller below that."""
    style: dict[str, Any] = {"ha": "left", "parse_math": False}
    # Empty lines make the layout leave room.
    room = printable(head) + "\n" * (lines.count("\n") + 1 if lines else 0)
    figure.suptitle(room, x=0.01, fontsize=12, fontweight="bold", **style)
    below = 1 - 24 / 72 / figure.get_figheight()
    lines = "\n".join(map(printable, lines.split("\n")))
    figure.text(0.01, below, lines, fontsize=SMALL, color=GREY, va="top", **style)
