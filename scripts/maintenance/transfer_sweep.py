"""The best learning rate by width, with and without transfer rules: docs/methods/transfer_width.md.

    python -m scripts.maintenance.transfer_sweep
    python -m scripts.maintenance.transfer_sweep --methods adamw shampoo --seeds 2

Every method is trained at rates a factor 2 apart, a factor of all rates of the run alike. As long
as the best mean is the lowest or the highest tried, the next rate beyond it is tried. What
docs/methods/transfer_width.jsonl holds is kept: stopped and started again, it goes on. The page and
the picture are written of what there is, --page writes them alone.
"""

import argparse
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nanogpt.config.presets import preset
from nanogpt.config.run import Config
from nanogpt.lab import compile_cache
from nanogpt.optimizers.transfer import RATES

FOLDER = pathlib.Path("docs/methods")
METHODS = ("adamw", "shampoo", "soap", "muon")
WIDTHS = (32, 64, 128, 256)  # the first is the base
BELOW, ABOVE = 2, 3  # powers of 2 around the best one of the narrower model, six in all
MOST = 14  # rates of one width
# What makes a run small enough, beside preset board: see `make_config`.
MODEL = {"num_layers": 1, "model_dim": WIDTHS[0], "head_dim": 16, "mlp_dim": 2 * WIDTHS[0]}
ROWS, LENGTH, STEPS = 8, 64, 200
MATRICES = {"shampoo": {"every": 10, "block_size": 128}, "soap": {"every": 10}}
Losses = dict[int, list[float]]  # of every power of 2, by seed


class Cell(NamedTuple):
    """One optimum: a method at a width, with the rules or without; at the base they are one."""

    method: str
    width: int
    rules: bool


def cells(methods: Sequence[str]) -> list[list[Cell]]:
    """Series of cells of growing width, which begin with the same one with and without rules."""
    return [
        [Cell(method, width, rules and width > WIDTHS[0]) for width in WIDTHS]
        for method in methods
        for rules in (False, True)
    ]


def make_config(cell: Cell, power: int, seed: int) -> Config:
    """The run of a cell at 2^power times the preset's rates, as `nanogpt train` would train it."""
    config = preset("board", cell.method)
    scale = lambda s: {n: getattr(s, n) * 2.0**power for n in RATES if hasattr(s, n)}  # noqa: E731
    own = MATRICES.get(cell.method, {}) | scale(config.matrices)
    sizes = {"sequence_length": LENGTH, "width_multiplier": cell.width / WIDTHS[0]}
    rows = {"batch_rows": ROWS, "microbatch_rows": ROWS}
    return dataclasses.replace(
        config,
        name=f"transfer/{cell.method}-{cell.width}{'-rules' * cell.rules}/{power}-{seed}",
        seed=seed,
        model=dataclasses.replace(config.model, **MODEL, **sizes, transfer=cell.rules),
        data=dataclasses.replace(config.data, **rows, seed=seed),
        matrices=dataclasses.replace(config.matrices, **own),
        auxiliary=dataclasses.replace(config.auxiliary, **scale(config.auxiliary)),
        schedule=dataclasses.replace(config.schedule, steps=STEPS),
    )


def tune(series: Sequence[Cell], seeds: int, path: pathlib.Path) -> None:
    """Trains what a series needs until the best mean of every width is inside its rates."""
    from nanogpt.lab.board import best, loss_of, next_powers
    from nanogpt.lab.shared_programs import run_shared
    from nanogpt.lab.trials import Trial, run_trials

    middle = 0
    for cell in series:
        means: dict[int, float] = {}
        start = range(middle - BELOW, middle + ABOVE + 1)
        while powers := next_powers(means, start, MOST):
            pairs = list(itertools.product(powers, range(seeds)))
            settings = dict(zip(("optimizer", "width", "rules"), cell, strict=True))
            trials = [Trial(settings | {"power": p}, make_config(cell, p, s)) for p, s in pairs]
            found = iter(run_trials(trials, path, run=run_shared))
            means |= {p: math.fsum(loss_of(next(found)) for _ in range(seeds)) for p in powers}
        middle = best(means)


def read_losses(path: pathlib.Path) -> dict[Cell, Losses]:
    """Losses of every cell; a run that ended above where it began counts as the loss of chance."""
    from nanogpt.lab.trials import read_trials

    chance = math.log(preset("board", "adamw").model.vocab_size)
    found: dict[Cell, dict[int, dict[int, float]]] = {}
    for record in read_trials(path):
        settings = record["settings"]
        cell = Cell(settings["optimizer"], settings["width"], settings["rules"])
        loss = record["loss"] if record["status"] == "finished" else chance
        of_power = found.setdefault(cell, {}).setdefault(settings["power"], {})
        of_power[record["seed"]] = min(loss, chance)
    return {cell: _whole(powers) for cell, powers in found.items()}


def _whole(powers: Mapping[int, Mapping[int, float]]) -> Losses:
    """As many seeds as leave at least six rates, and the rates that have them all."""
    for count in range(max(map(len, powers.values())), 0, -1):
        had = {
            p: [x[s] for s in range(count)]
            for p, x in powers.items()
            if set(range(count)) <= set(x)
        }
        if len(had) >= BELOW + ABOVE + 1:
            return dict(sorted(had.items()))
    return {}


def vertex(losses: Mapping[int, float]) -> float:
    """Where the parabola through the lowest loss and its two neighbours is lowest; nan at an edge.

    >>> vertex({0: 2.0, 1: 1.0, 2: 1.5})
    1.1666666666666667
    """
    middle = min(losses, key=losses.__getitem__)
    if not {middle - 1, middle + 1} <= set(losses):
        return math.nan
    low, least, high = (losses[middle + step] for step in (-1, 0, 1))
    curvature = low - 2 * least + high
    return middle + ((low - high) / (2 * curvature) if curvature else 0.0)


def optimum(losses: Losses) -> tuple[float, float, float]:
    """The vertex of the means over seeds, and the lowest and highest of all resampled seeds."""
    count = len(next(iter(losses.values())))

    def of(chosen: Sequence[int]) -> float:
        return vertex({p: math.fsum(x[s] for s in chosen) / count for p, x in losses.items()})

    drawn = [of(chosen) for chosen in itertools.product(range(count), repeat=count)]
    known = [x for x in drawn if math.isfinite(x)]
    return of(range(count)), min(known, default=math.nan), max(known, default=math.nan)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--page", action="store_true", help="write page and picture alone")
    options = parser.parse_args()
    compile_cache.prepare()
    path = FOLDER / "transfer_width.jsonl"
    if not options.page:
        from nanogpt.lab.preset_data import prepare_data

        prepare_data(preset("board", "adamw"))
        for series in cells(options.methods):
            tune(series, options.seeds, path)
    from scripts.maintenance.transfer_page import write

    write(FOLDER, read_losses(path))


if __name__ == "__main__":
    main()
