"""The best learning rate by width, with and without transfer rules: docs/methods/transfer_width.md.

    python -m scripts.maintenance.transfer_sweep
    python -m scripts.maintenance.transfer_sweep --methods adamw shampoo --seeds 2

Every method is trained at rates a factor 2 apart, a factor of all rates of the run alike. As long
as the best mean is the lowest or the highest tried, the next rate beyond it is tried. Then the rate
of the matrices alone, the others at what was best at the base, since a common factor has to suit
all. What docs/methods/transfer_width.jsonl holds is kept: started again, it goes on. The
page and the picture are written of what there is, --page writes them alone.
"""

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from nanogpt.config.presets import preset
from nanogpt.config.run import Config
from nanogpt.lab import compile_cache
from nanogpt.optimizers.transfer import RATES
from scripts.maintenance.transfer_optima import (
    ABOVE,
    BELOW,
    METHODS,
    WIDTHS,
    Cell,
    cells,
    read_losses,
)

FOLDER = pathlib.Path("docs/methods")
MOST = 14  # rates of one width
# What makes a run small enough, beside preset board: see `make_config`.
MODEL = {"num_layers": 1, "model_dim": WIDTHS[0], "head_dim": 16, "mlp_dim": 2 * WIDTHS[0]}
ROWS, LENGTH, STEPS = 8, 64, 200
MATRICES = {"shampoo": {"every": 10, "block_size": 128}, "soap": {"every": 10}}


def make_config(cell: Cell, power: int, seed: int, others: int | None = None) -> Config:
    """The run of a cell at 2^power times the preset's rates, as `nanogpt train` would train it.

    Args:
        cell: method, width, rules.
        power: of the matrices' rate, and of all others where `others` is None.
        seed: of weights and data.
        others: power of the other rates.
    """
    config = preset("board", cell.method)

    def scale(s: Any, power: int) -> dict[str, Any]:
        return {n: getattr(s, n) * 2.0**power for n in RATES if hasattr(s, n)}

    rest = scale(config.auxiliary, power if others is None else others)
    own: Any = MATRICES.get(cell.method, {}) | scale(config.matrices, power)
    sizes: Any = {"sequence_length": LENGTH, "width_multiplier": cell.width / WIDTHS[0]}
    rows = {"batch_rows": ROWS, "microbatch_rows": ROWS}
    return dataclasses.replace(
        config,
        name=f"transfer/{cell.method}-{cell.width}{'-rules' * cell.rules}/{power}-{others}-{seed}",
        seed=seed,
        model=dataclasses.replace(config.model, **MODEL, **sizes, transfer=cell.rules),
        data=dataclasses.replace(config.data, **rows, seed=seed),
        matrices=dataclasses.replace(config.matrices, **own),
        auxiliary=dataclasses.replace(config.auxiliary, **rest),
        schedule=dataclasses.replace(config.schedule, steps=STEPS),
    )


def tune(series: Sequence[Cell], seeds: int, path: pathlib.Path) -> None:
    """Trains what a series needs until the best mean of every width is inside its rates.

    Args:
        series: of growing width; those of others are `alone`, once the common factor has its best.
        seeds: runs of every rate.
        path: of the records.
    """
    from nanogpt.lab.board import best, next_powers

    middle, settings = 0, {}
    if series[0].alone:
        base = read_losses(path)[series[0]._replace(rules=False, alone=False)]
        middle = best({power: math.fsum(x) for power, x in base.items()})
        settings = {"matrices": middle, "others": middle}
        means: dict[int, float] = {}
        while powers := next_powers(means, range(middle - 1, middle + 5), MOST):
            told = [{"power": middle, **settings, "others": p} for p in powers]
            means |= zip(powers, train(series[0], told, seeds, path), strict=True)
        settings["others"] = best(means)
    for cell in series:
        means = {}
        start = range(middle - BELOW, middle + ABOVE + 1)
        while powers := next_powers(means, start, MOST):
            told = [{"power": p, **settings} for p in powers]
            means |= zip(powers, train(cell, told, seeds, path), strict=True)
        middle = best(means)


def train(
    cell: Cell, wanted: Sequence[dict[str, int]], seeds: int, path: pathlib.Path
) -> list[float]:
    """Sums over seeds of the losses of a cell's runs, each told by its powers of 2."""
    from nanogpt.lab.board import loss_of
    from nanogpt.lab.shared_programs import run_shared
    from nanogpt.lab.trials import Trial, run_trials

    about = dict(zip(("optimizer", "width", "rules"), cell, strict=False))
    trials = [
        Trial(about | told, make_config(cell, told["power"], seed, told.get("others")))
        for told in wanted
        for seed in range(seeds)
    ]
    found = iter(run_trials(trials, path, run=run_shared))
    return [math.fsum(loss_of(next(found)) for _ in range(seeds)) for _ in wanted]


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

    write(FOLDER, read_losses(path), make_config(cells(METHODS)[0][0], 0, 0))


if __name__ == "__main__":
    main()
