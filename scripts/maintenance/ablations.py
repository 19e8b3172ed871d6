"""What each part of the recipe is worth: docs/recipe.md, by paired runs on the scaled-down board.

    python -m scripts.maintenance.ablations
    python -m scripts.maintenance.ablations --points soap 'exponent 0.5' --seeds 4
    python -m scripts.maintenance.ablations --judge board prose reference

Every point is tuned and trained by the rule of docs/recipe.md. What docs/recipe/runs.jsonl holds is
kept: stopped and started again, it goes on, and more seeds are added to what there is. Page and
picture are written after every point, --page writes them alone. --judge trains tuned optimizers on
seeds that nothing was chosen by, on the texts that are named.
"""

import argparse
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nanogpt.lab import compile_cache
from nanogpt.optimizers.build import build_optimizer
from scripts.maintenance.ablation_points import (
    ABLATING,
    COMPLETE,
    FAMILIES,
    JUDGING,
    TUNING,
    Point,
    Run,
    build_complete,
    loss,
    make_config,
    make_points,
)
from scripts.maintenance.transfer_optima import vertex

FOLDER = pathlib.Path("docs")
RUNS = FOLDER / "recipe" / "runs.jsonl"
MOST = 5  # rates that tune one optimizer
STEP = 8  # chosen powers of 2 are whole multiples of 1 / STEP
Train = Callable[[Sequence[Run]], Sequence[float]]


class Chosen(NamedTuple):
    """Powers of 2 by which rates of the matrices and of all others are multiplied."""

    rate: float
    auxiliary: float


def tune(point: str, middle: Chosen, auxiliary: bool, train: Train) -> Chosen:
    """Chooses rates by the rule of docs/recipe.md.

    Args:
        point: name of what is tuned.
        middle: where to begin.
        auxiliary: whether the others' rates are tuned too, after those of the matrices.
        train: gives final losses of runs.

    Returns:
        The lowest points of the parabolas.
    """
    from nanogpt.lab.board import next_powers

    def best(runs: Callable[[float], Chosen]) -> float:
        losses: dict[int, float] = {}
        wanted = [-1, 0, 1]
        while wanted:
            found = train([Run(point, *runs(power), TUNING) for power in wanted])
            losses |= zip(wanted, found, strict=True)
            wanted = next_powers(losses, (), MOST)
        lowest = vertex(losses)
        return (
            round(STEP * lowest) / STEP
            if math.isfinite(lowest)
            else min(losses, key=losses.__getitem__)
        )

    rate = middle.rate + best(lambda p: Chosen(middle.rate + p, middle.auxiliary))
    if not auxiliary:
        return Chosen(rate, middle.auxiliary)
    return Chosen(rate, middle.auxiliary + best(lambda p: Chosen(rate, middle.auxiliary + p)))


def settle(point: Point, train: Train) -> Chosen:
    """A point's rates: of a family's first one both, of others that of the matrices around its."""
    first = tune(point.family, Chosen(0.0, 0.0), point.family not in COMPLETE, train)
    if point.name == point.family:
        return first
    own = "matrices.learning_rate" in point.changes
    middle = Chosen(0.0, first.auxiliary) if own else first
    return tune(point.name, middle, False, train)


def trainer(points: dict[str, Point]) -> Train:
    """Trains runs that RUNS does not hold, and keeps them there."""
    from nanogpt.lab.shared_programs import run_shared
    from nanogpt.lab.trials import Trial, run_trials

    def train(runs: Sequence[Run]) -> list[float]:
        trials = [Trial(run._asdict(), make_config(points[run.point], run)) for run in runs]
        build = build_complete if points[runs[0].point].family in COMPLETE else build_optimizer
        run = functools.partial(run_shared, build=build)
        return list(map(loss, run_trials(trials, RUNS, run=run)))

    return train


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", nargs="+", metavar="NAME", help="some, in this order")
    parser.add_argument("--seeds", type=int, default=len(ABLATING))
    parser.add_argument("--judge", nargs="+", default=[], metavar="TEXT", help="folders of data/")
    parser.add_argument("--page", action="store_true", help="write page and picture alone")
    options = parser.parse_args()
    compile_cache.prepare()
    from scripts.maintenance.ablation_page import write

    points = {point.name: point for point in make_points()}
    wanted = [points[name] for name in options.points or points]
    train = trainer(points)
    for point in [] if options.page else wanted:
        chosen = settle(point, train)
        if not options.judge:
            train([Run(point.name, *chosen, seed) for seed in ABLATING[: options.seeds]])
        elif point.name in FAMILIES:
            seeds = JUDGING[: options.seeds]
            train([Run(point.name, *chosen, s, text) for text in options.judge for s in seeds])
        write(FOLDER, RUNS, points)
    write(FOLDER, RUNS, points)


if __name__ == "__main__":
    main()
