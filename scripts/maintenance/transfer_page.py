"""Page and picture of `scripts.maintenance.transfer_sweep`."""

import math
import pathlib
from collections.abc import Iterator, Mapping

import matplotlib
from matplotlib.figure import Figure

from nanogpt.config.presets import preset
from nanogpt.config.run import Config
from nanogpt.report.plotting import COLOURS, STYLE
from nanogpt.report.tables import markdown, shown
from scripts.maintenance.transfer_optima import METHODS, WIDTHS, Cell, Losses, cells, optimum

TEXT = """# The best learning rate by width

Written by `python -m scripts.maintenance.transfer_sweep`, which goes on where it was stopped;
[transfer_width.jsonl](transfer_width.jsonl) has every run. The board's text and model, smaller:
one block, mlp_dim twice the width, heads of 16, vocabulary {vocabulary}; {steps} steps of {batch}
tokens, the preset's schedules and ratios of rates, with Shampoo and SOAP refreshed at every tenth
step and Shampoo in blocks of 128. All rates of a run are multiplied by one factor, as in the paper;
the tables name that of the matrices. In the rows "matrices alone" it is the matrices' rate that is
another one; the others stay at what was best at the base, in a search of their own. Rates are a
factor 2 apart, six or more, until the best mean is not at an edge; losses in nats per token on
16,384 validation tokens, a run that ended above its start counts as chance.

The optimum is the vertex of the parabola, in the logarithm of the rate, through the lowest mean
over n seeds and its two neighbours. In brackets the lowest and highest vertex of all ways to draw n
seeds with replacement. Width {base} is the base: there the rules change nothing. "Moves by" is the
largest optimum over the smallest; the last column is the loss of the widest model at the rate that
is best at the base, "-" where it was not tried there.

{table}

![losses by rate, and the best rate by width](transfer_width.png)

## Every rate

{losses}
"""

Found = Mapping[Cell, Losses]
KINDS = {
    "without": "without the rules",
    "with": "with the rules",
    "with, matrices alone": "matrices alone",
}
Row = tuple[str, str, list[Cell]]  # method, kind, cells by width


def write(folder: pathlib.Path, found: Found, config: Config) -> None:
    """Writes transfer_width.md and transfer_width.png of the cells that are there.

    Args:
        folder: where.
        found: losses of every cell.
        config: one of the runs, whose sizes the page tells.
    """
    rows = [row for row in _rows() if any(found.get(cell) for cell in row[2])]
    text = TEXT.format(**_numbers(config), table=_optima(rows, found), losses=_tried(found))
    (folder / "transfer_width.md").write_text(text, encoding="utf-8")
    _draw(folder / "transfer_width.png", rows, found)


def _rows() -> Iterator[Row]:
    for method in METHODS:
        for series in cells([method]):
            yield method, series[-1].kind, series


def _numbers(config: Config) -> dict[str, str]:
    return {
        "batch": f"{config.data.batch_rows} x {config.model.sequence_length}",
        "steps": str(config.schedule.steps),
        "base": str(WIDTHS[0]),
        "vocabulary": f"{config.model.vocab_size:,}",
    }


def _rate(cell: Cell, power: float) -> float:
    """Learning rate of the matrices at a power of 2 times the preset's; others go with it."""
    return preset("board", cell.method).matrices.learning_rate * 2.0**power


def _optima(rows: list[Row], found: Found) -> str:
    """Every row's optima with their intervals, and by how much they move."""
    lines = []
    for method, kind, series in rows:
        known = {cell: optimum(found[cell]) for cell in series if found.get(cell)}
        optima = [_cell(cell, known.get(cell)) for cell in series]
        counts = sorted({len(next(iter(found[cell].values()))) for cell in known})
        middles = [x[0] for x in known.values() if math.isfinite(x[0])]
        whole = len(middles) == len(WIDTHS)
        moved = f"2^{max(middles) - min(middles):.2f}" if whole else "-"
        named = "-".join(map(str, counts))
        ends = _ends(found.get(series[0], {}), found.get(series[-1], {}))
        lines.append([method, kind, *optima, named, moved, *ends])
    head = ["method", "rules", *(f"width {w}" for w in WIDTHS), "n", "moves by"]
    ends = [f"best loss at {WIDTHS[-1]}", "with the base's rate"]
    return markdown([*head, *ends], lines, texts=2)


def _ends(base: Losses, widest: Losses) -> list[str]:
    """The lowest mean of the widest model, and that at the rate whose mean is the base's lowest."""
    means = [{power: _mean(x) for power, x in losses.items()} for losses in (base, widest)]
    if not all(means):
        return ["-", "-"]
    chosen = min(means[0], key=means[0].__getitem__)
    return [f"{min(means[1].values()):.4f}", shown(means[1].get(chosen), ".4f")]


def _cell(cell: Cell, known: tuple[float, float, float] | None) -> str:
    if known is None:
        return "-"
    middle, low, high = (f"{_rate(cell, x):.2g}" if math.isfinite(x) else "edge" for x in known)
    return f"{middle} ({low} to {high})"


def _tried(found: Found) -> str:
    """Mean loss of every rate of every cell."""
    rows = []
    for cell, losses in sorted(found.items(), key=lambda item: _order(item[0])):
        if not losses:
            continue
        means = {power: _mean(x) for power, x in losses.items()}
        least = min(means.values())
        told = [
            f"{'**' * (mean == least)}{_rate(cell, power):.3g}: {mean:.4f}{'**' * (mean == least)}"
            for power, mean in means.items()
        ]
        kind = "either" if cell.width == WIDTHS[0] and not cell.alone else cell.kind
        count = str(len(next(iter(losses.values()))))
        rows.append([cell.method, str(cell.width), kind, ", ".join(told), count])
    return markdown(["method", "width", "rules", "rate: mean loss", "n"], rows, texts=4)


def _order(cell: Cell) -> tuple[int, bool, bool, int]:
    return METHODS.index(cell.method), cell.alone, cell.rules, cell.width


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _draw(path: pathlib.Path, rows: list[Row], found: Found) -> None:
    """Losses by rate without and with the rules, and the optima by width, a column a method."""
    methods = list(dict.fromkeys(method for method, _, _ in rows))
    with matplotlib.rc_context(STYLE | {"font.size": 10}):
        figure = Figure(figsize=(3.4 * len(methods), 11), dpi=110, layout="constrained")
        grid = figure.subplots(len(KINDS) + 1, len(methods), squeeze=False)
        for method, kind, series in rows:
            column = methods.index(method)
            axes, below = grid[list(KINDS).index(kind)][column], grid[-1][column]
            for cell, colour in zip(series, COLOURS, strict=False):
                if losses := found.get(cell):
                    rates = [_rate(cell, power) for power in losses]
                    means = [_mean(x) for x in losses.values()]
                    axes.plot(rates, means, marker="o", color=colour, label=f"width {cell.width}")
            lowest = [_mean(x) for c in series for x in found.get(c, {}).values()]
            axes.set_ylim(min(lowest) - 0.02, min(lowest) + 0.6)
            axes.set_xscale("log", base=2)
            axes.set_title(f"{method}, {KINDS[kind]}")
            points = [(c, optimum(found[c])) for c in series if found.get(c)]
            middles = [_rate(c, x[0]) for c, x in points]
            spread = [[_rate(c, x[0]) - _rate(c, x[1]) for c, x in points]]
            spread.append([_rate(c, x[2]) - _rate(c, x[0]) for c, x in points])
            style = {"marker": "o", "capsize": 4, "linestyle": "--" if kind == "without" else "-"}
            widths = [c.width for c, _ in points]
            spread = [[max(0.0, x) for x in side] for side in spread]
            colour = COLOURS[list(KINDS).index(kind)]
            below.errorbar(widths, middles, spread, color=colour, label=KINDS[kind], **style)
            below.set_xscale("log", base=2)
            below.set_yscale("log", base=2)
            below.set(xlabel="width", title=f"{method}: best rate")
        grid[0][0].legend(frameon=False)
        grid[-1][0].legend(frameon=False)
        for row in grid[:-1]:
            row[0].set_ylabel("validation loss")
        for axes in grid[-2]:
            axes.set_xlabel("learning rate of the matrices")
        figure.savefig(path)
