"""Pictures of a run's factors: their eigenvalues over training, and maps of layers by step."""

import dataclasses
import fnmatch
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm
from matplotlib.figure import Figure

from nanogpt.report.plotting import GREY, STYLE
from nanogpt.report.tables import markdown, printable
from nanogpt.train.metrics import read_records, read_start
from nanogpt.train.paths import Path
from nanogpt.train.stored import expecting_form

EPS = 2.0**-23  # machine epsilon of float32, in which factors are kept
SIDES = {"0": "inputs", "1": "outputs"}
ROWS = 4  # matrices drawn where none are chosen


@dataclasses.dataclass(frozen=True)
class Spectra:
    """What a run recorded of its factors.

    Attributes:
        name: of the run.
        settings: its own, as JSON has them.
        steps: at which something was recorded.
        matrices: {matrix: {step: record}}, see `nanogpt.train.spectra.spectra_reader`.
    """

    name: str
    settings: dict[str, Any]
    steps: tuple[int, ...]
    matrices: dict[str, dict[int, Any]]

    def cutoff(self, dimension: int) -> float | None:
        """Eigenvalues up to this part of the largest one count as zero; None: that is not cut."""
        matrices = self.settings["matrices"]
        cut = self.settings["optimizer"] == "shampoo" and matrices["cutoff"] == "relative"
        return dimension * EPS if cut else None

    def figure(self, matrix: str, side: str | None, name: str) -> list[float]:
        """A figure at every step, NaN where there is none."""
        found = []
        for step in self.steps:
            record = self.matrices[matrix].get(step, {})
            value = (record if side is None else record.get(side, {})).get(name)
            found.append(math.nan if value is None else float(value))
        return found

    def kept(self, matrix: str, side: str) -> list[float]:
        """Share of a factor's directions that its root keeps; NaN where the factor is zero."""
        names = ("dimension", "kept_rank", "effective_rank")
        sizes, ranks, effective = (self.figure(matrix, side, name) for name in names)
        return [r / d if e else math.nan for d, r, e in zip(sizes, ranks, effective, strict=True)]

    def choose(self, wanted: Sequence[str]) -> list[str]:
        """Names that match a pattern; of all of them a few from the first layer to the last.

        Raises:
            ValueError: a pattern that matches none.
        """
        names = list(self.matrices)
        if not wanted:
            return [names[k] for k in sorted(set(np.linspace(0, len(names) - 1, ROWS).astype(int)))]
        for pattern in wanted:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"matrices={pattern!r}: matches none of {', '.join(names)}.")
        return [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in wanted)]


def read_spectra(folder: Path) -> Spectra:
    """Reads what a run recorded.

    Raises:
        ValueError: no run, one without spectra, or records of another form.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{folder}: holds no run: give the folder that has metrics.jsonl.")
    start = read_start(path)
    with expecting_form(path):
        records = {r["step"]: r["matrices"] for r in read_records(path) if r["kind"] == "spectra"}
        names = sorted({name for record in records.values() for name in record}, key=_natural)
    if not names:
        raise ValueError(
            f"{folder}: the run recorded no spectra: train with --monitor 10, with an optimizer "
            "that has factors (shampoo, soap, kl_shampoo, kl_soap)."
        )
    steps = tuple(sorted(records))
    by_matrix = {n: {s: records[s][n] for s in steps if n in records[s]} for n in names}
    return Spectra(start["config"]["name"], start["config"], steps, by_matrix)


def _natural(name: str) -> list[Any]:
    """Order by layer, in which block 10 comes after block 9."""
    return [
        (0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.replace("#", "/").split("/")
    ]


def draw_spectra(spectra: Spectra, wanted: Sequence[str], out: pathlib.Path) -> list[pathlib.Path]:
    """Draws spectrum.png, eigenvalues of chosen matrices, and spectrum_map.png, all matrices.

    Args:
        spectra: of a run.
        wanted: names of matrices or patterns, as in "blocks/0/*"; none: a few.
        out: folder, made if it is not there.

    Returns:
        The two files.
    """
    chosen = spectra.choose(wanted)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "spectrum.png", out / "spectrum_map.png"]
    with matplotlib.rc_context(STYLE | {"font.size": 11}):
        eigenvalues_figure(spectra, chosen).savefig(paths[0])
        maps_figure(spectra).savefig(paths[1])
    return paths


def _title(spectra: Spectra) -> str:
    model, data = spectra.settings["model"], spectra.settings["data"]
    size = f"{model['num_layers']} layers of width {model['model_dim']}"
    tokens = f"{data['batch_rows']} x {model['sequence_length']} tokens a step"
    return f"run {printable(spectra.name)} ({spectra.settings['optimizer']}): {size}, {tokens}"


def eigenvalues_figure(spectra: Spectra, chosen: Sequence[str]) -> Figure:
    """A row a matrix, a column a side: eigenvalues by step, from the largest to the smallest."""
    figure = Figure(figsize=(9, 1.2 + 2.1 * len(chosen)), dpi=110, layout="constrained")
    panels = figure.subplots(len(chosen), 2, sharex=True, sharey=True, squeeze=False)
    for matrix, row in zip(chosen, panels, strict=True):
        for (side, told), axes in zip(SIDES.items(), row, strict=True):
            _panel(axes, spectra, matrix, side)
            axes.set_title(f"{matrix}, {told}", fontsize=10, loc="left", parse_math=False)
    for axes in panels[-1]:
        axes.set_xlabel("optimizer step")
    figure.supylabel("eigenvalue / largest one")
    figure.suptitle(_title(spectra), fontsize=11, parse_math=False)
    return figure


def _panel(axes: Axes, spectra: Spectra, matrix: str, side: str) -> None:
    records = {s: r[side] for s, r in spectra.matrices[matrix].items() if r.get(side)}
    axes.set_yscale("log")
    axes.set_ylim(1e-10, 2)
    if not records:
        axes.text(0.5, 0.5, "no factor", transform=axes.transAxes, ha="center", color=GREY)
        return
    last = list(records.values())[-1]
    values = np.array([r["eigenvalues"] for r in records.values()], float)
    values[~(values > 0)] = np.nan  # what rounding made negative has no place on the axis
    for k, colour in enumerate(_shades(values.shape[1])):
        marker = "." if len(records) == 1 else None
        axes.plot(list(records), values[:, k], color=colour, linewidth=0.9, marker=marker)
    told = f"{_told(last['kept_rank'], '.0f')} of {last['dimension']} kept at the end"
    cutoff = spectra.cutoff(last["dimension"])
    if cutoff is not None:
        axes.axhline(cutoff, color="#D55E00", linestyle=(0, (5, 2)), linewidth=1.4)
    page = matplotlib.rcParams["axes.facecolor"]
    halo = {"facecolor": page, "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    axes.text(0.98, 0.04, told, transform=axes.transAxes, ha="right", fontsize=9, bbox=halo)


def _shades(count: int) -> list[Any]:
    """From dark, the largest eigenvalue, to light."""
    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0, 0.9, count)]


def maps_figure(spectra: Spectra) -> Figure:
    """A panel a figure: matrices from top to bottom, steps from left to right, colour the value."""
    kept: Callable[[str], Any] = lambda side: lambda m: spectra.kept(m, side)  # noqa: E731
    of: Callable[[str, str | None], Any]
    of = lambda name, side: lambda m: spectra.figure(m, side, name)  # noqa: E731
    panels = [
        *(("share of directions kept, " + SIDES[s], kept(s), (0, 1), False) for s in SIDES),
        *(("energy dropped, " + SIDES[s], of("dropped_energy", s), None, True) for s in SIDES),
        *(("residual of the root, " + SIDES[s], of("root_residual", s), None, True) for s in SIDES),
        ("graft ratio", of("graft_ratio", None), None, True),
        ("refreshes that failed", of("failures", None), None, True),
    ]
    height = 1.0 + 4 * (0.7 + 0.16 * len(spectra.matrices))
    figure = Figure(figsize=(11, height), dpi=110, layout="constrained")
    grid = figure.subplots(4, 2, sharex=True, sharey=True)
    for axes, (title, read, limits, logarithmic) in zip(grid.ravel(), panels, strict=True):
        values = np.array([read(matrix) for matrix in spectra.matrices], float)
        _map(figure, axes, spectra, values, limits, logarithmic)
        axes.set_title(title, fontsize=10, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("optimizer step")
    figure.suptitle(_title(spectra), fontsize=11, parse_math=False)
    return figure


def _map(
    figure: Figure, axes: Axes, spectra: Spectra, values: np.ndarray, limits: Any, logarithmic: bool
) -> None:
    """What is not positive on a logarithmic scale, and what was not recorded, is grey."""
    names = list(spectra.matrices)
    colours: Colormap = matplotlib.colormaps["cividis"].with_extremes(bad="#d9d9d9")
    shown = np.where(values > 0, values, np.nan) if logarithmic else values
    style: dict[str, Any] = {"cmap": colours, "shading": "nearest", "rasterized": True}
    found = shown[np.isfinite(shown)]
    if limits is None:
        limits = (found.min(), found.max()) if found.size else (1.0, 1.0)
    if logarithmic and found.size and limits[0] < limits[1]:
        style["norm"] = LogNorm(*limits)
    else:
        style |= {"vmin": limits[0], "vmax": limits[1] or 1.0}
    steps = spectra.steps
    if len(steps) == 1:  # a column has the width of its distance from the next
        steps, shown = (steps[0], steps[0] + 1), np.repeat(shown, 2, axis=1)
    picture = axes.pcolormesh(steps, range(len(names)), shown, **style)
    axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False)
    if found.size:
        figure.colorbar(picture, ax=axes, pad=0.01)
    else:
        axes.text(0.5, 0.5, "0 everywhere", transform=axes.transAxes, ha="center", color=GREY)


def table(spectra: Spectra) -> str:
    """The last record of every matrix and side, as a table of Markdown."""
    return markdown(*last_figures(spectra), texts=2)


def last_figures(spectra: Spectra) -> tuple[list[str], list[list[str]]]:
    """The last record of every matrix and side: titles of columns, and rows."""
    heads = ["kept", "effective rank", "energy dropped", "residual", "graft ratio"]
    rows = []
    for matrix in spectra.matrices:
        last = spectra.matrices[matrix][max(spectra.matrices[matrix])]
        for side, told in SIDES.items():
            if record := last.get(side):
                figures = (
                    f"{_told(record['kept_rank'], '.0f')} of {record['dimension']}",
                    _told(record["effective_rank"], ".1f"),
                    _told(record["dropped_energy"], ".1e"),
                    _told(record["root_residual"], ".1e"),
                    _told(last["graft_ratio"], ".3g"),
                )
                rows.append([matrix, told, *figures])
    return ["matrix", "side", *heads], rows


def _told(value: float | None, form: str) -> str:
    """A figure; what was no number is recorded as None."""
    return "no number" if value is None else format(value, form)
