"""What each part of the recipe is worth: docs/recipe.md, by paired runs on the scaled-down board.

    python -m scripts.maintenance.ablations
    python -m scripts.maintenance.ablations --points soap 'exponent 0.5' --seeds 4
    python -m scripts.maintenance.ablations --judge board prose reference

Every point is tuned and trained by the rule of docs/recipe.md. What docs/recipe/runs.jsonl holds is
kept: stopped and started again, it goes on, and more seeds are added to what there is. Page and
picture are written after every point, --page writes them alone. --judge trains on seeds that
nothing was chosen by, on the texts that are named, with --board board_m on M, with --again on the
seeds that judge once more. --jobs 2 trains two runs at a time, on half of the cores each.
"""

import argparse
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from nanogpt.config.presets import preset
from nanogpt.lab import compile_cache
from nanogpt.optimizers.build import build_optimizer
from scripts.maintenance.ablation_complete import COMPLETE, build_complete
from scripts.maintenance.ablation_points import (
    ABLATING,
    AGAIN,
    JUDGING,
    TUNING,
    Point,
    Run,
    loss,
    make_config,
    make_points,
)
from scripts.maintenance.ablation_tables import TEXTS
from scripts.maintenance.ablation_texts import check_texts
from scripts.maintenance.transfer_optima import vertex

FOLDER = pathlib.Path("docs")
RUNS = FOLDER / "recipe" / "runs.jsonl"
MOST = 5  # rates of the matrices that tune one optimizer
OTHERS = 8  # rates of all other parameters
ON_M = 3  # rates of the matrices there
STEP = 8  # chosen powers of 2 are whole multiples of 1 / STEP
Train = Callable[[Sequence[Run]], Sequence[float]]


class Chosen(NamedTuple):
    """Powers of 2 by which rates of the matrices and of all others are multiplied."""

    rate: float
    auxiliary: float


def tune(run: Run, auxiliary: bool, train: Train, most: int = MOST) -> Chosen:
    """Chooses rates by the rule of docs/recipe.md.

    Args:
        run: what is tuned, at the rates where to begin.
        auxiliary: whether the others' rates are tuned too, after those of the matrices.
        train: gives final losses of runs.
        most: trials of the matrices' rate.

    Returns:
        The lowest points of the parabolas.
    """
    run = run._replace(rate=_best(run, "rate", train, most))
    if auxiliary:
        run = run._replace(auxiliary=_best(run, "auxiliary", train, OTHERS))
    return Chosen(run.rate, run.auxiliary)


def _best(run: Run, which: str, train: Train, most: int) -> float:
    """The power of 2 of one rate where a parabola is lowest, or the best one if it is an edge."""
    from nanogpt.lab.board import best, next_powers

    losses: dict[int, float] = {}
    wanted, middle = [-1, 0, 1], getattr(run, which)
    while wanted:
        tried = [run._replace(seed=TUNING, **{which: middle + power}) for power in wanted]
        losses |= zip(wanted, train(tried), strict=True)
        wanted = next_powers(losses, (), most)
    lowest = vertex(losses)
    return middle + (round(STEP * lowest) / STEP if math.isfinite(lowest) else best(losses))


def settle(point: Point, train: Train, board: str = "board", on_m: int = ON_M) -> Chosen:
    """A point's rates: of a family's first one both, of others that of the matrices around its.

    On another board than S that of the matrices again, with `on_m` trials.
    """
    chosen = tune(Run(point.family, 0.0, 0.0, TUNING), point.family not in COMPLETE, train)
    if point.name != point.family:
        own = "matrices.learning_rate" in point.changes
        begin = Chosen(0.0, chosen.auxiliary) if own else chosen
        chosen = tune(Run(point.name, *begin, TUNING), False, train)
    if board == "board":
        return chosen
    return tune(Run(point.name, *chosen, TUNING, board=board), False, train, most=on_m)


def trainer(points: dict[str, Point], jobs: int) -> Train:
    """Trains runs that RUNS does not hold, `jobs` at a time, and keeps them there."""
    from nanogpt.lab.shared_programs import run_shared
    from nanogpt.lab.trials import Trial, run_trials

    def train(runs: Sequence[Run]) -> list[float]:
        trials = [Trial(run._asdict(), make_config(points[run.point], run)) for run in runs]
        complete = any(points[run.point].family in COMPLETE for run in runs)  # all are, or none
        build = build_complete if complete else build_optimizer
        one = functools.partial(run_shared, build=build)
        return list(map(loss, run_trials(trials, RUNS, jobs=jobs, run=one)))

    return train


def _check(texts: Sequence[str], point: Point) -> None:
    from nanogpt.lab.trials import read_trials
    from nanogpt.train.batches import open_data

    configs = {t: make_config(point, Run(point.name, 0.0, 0.0, TUNING, t)) for t in texts}
    found = {text: open_data(config).identity["data"] for text, config in configs.items()}
    check_texts(found, read_trials(RUNS))


def _read_options(points: Mapping[str, Point]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--points", nargs="+", choices=points, metavar="NAME", help="some, in this order"
    )
    parser.add_argument("--seeds", type=int, help="this many, all by default; 0 tunes alone")
    parser.add_argument("--judge", nargs="+", default=[], choices=TEXTS, help="folders of data/")
    parser.add_argument("--again", action="store_true", help="judge on the seeds for that")
    parser.add_argument("--board", default="board", choices=("board", "board_m"))
    parser.add_argument("--trials", type=int, help=f"rates on M; {ON_M} by the rule")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, with a share of cores")
    parser.add_argument("--page", action="store_true", help="write page and picture alone")
    options = parser.parse_args()
    if not options.judge and (options.again or options.board != "board"):
        parser.error("--again and --board say how to --judge: name its texts.")
    if options.trials is not None and (options.board != "board_m" or options.trials < ON_M):
        parser.error(f"--trials {options.trials}: {ON_M} or more, with --board board_m.")
    seeds = len(_seeds(options))
    if options.seeds is not None and not 0 <= options.seeds <= seeds:
        parser.error(f"--seeds {options.seeds}: from 0 to {seeds}, as many as there are.")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1.")
    return options


def _seeds(options: argparse.Namespace) -> range:
    """All seeds on which points are compared."""
    judging = AGAIN if options.again else JUDGING
    return judging if options.judge else ABLATING


def main() -> None:
    """Reads the command line."""
    points = {point.name: point for point in make_points()}
    options = _read_options(points)
    from scripts.maintenance.ablation_page import write

    if options.page:
        write(FOLDER, RUNS, points)
        return
    compile_cache.prepare()
    from nanogpt.lab.preset_data import prepare_data

    prepare_data(preset("board", "adamw"))
    wanted = [points[name] for name in options.points or points]
    _check(["board", *options.judge], wanted[0])
    train = trainer(points, options.jobs)
    for point in wanted:
        chosen = settle(point, train, options.board, options.trials or ON_M)
        texts = options.judge or ["board"]
        seeds = _seeds(options)[: options.seeds]
        train([Run(point.name, *chosen, s, t, options.board) for t in texts for s in seeds])
        write(FOLDER, RUNS, points)


if __name__ == "__main__":
    main()
