"""Does what may happen to a run to real ones, and writes what became of them: docs/faults.md.

    make faults                                 every part, some hours of two cores
    make faults ARGS="kill stop --trials 4"     some parts again, with fewer trials

Each trial is kept as soon as it is done. Parts: exact, kill, stop, disk (a real small disk, which
needs root), workers, moves (to other devices), accidents, damage, fuzz. The seed decides moments
and places.
"""

import argparse
import dataclasses
import functools
import logging
import pathlib
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator

from nanogpt.train.provenance import provenance
from scripts.maintenance.faulting.accidents import accidents, damaged_checkpoints
from scripts.maintenance.faulting.disk import full_disks
from scripts.maintenance.faulting.exact import exact, recipes
from scripts.maintenance.faulting.kills import kills, stops
from scripts.maintenance.faulting.kinds import fuzz_all
from scripts.maintenance.faulting.moves import moves
from scripts.maintenance.faulting.outcome import Results, Trial
from scripts.maintenance.faulting.report import page
from scripts.maintenance.faulting.workers import workers

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
# Trials of a part, where --trials does not tell.
TRIALS = {
    **{"exact": len(recipes()), "kill": 24, "stop": 8, "disk": 8, "workers": 4, "moves": 9},
    **{"accidents": 0, "damage": 40, "fuzz": 2000},
}


def parts(folder: pathlib.Path, seed: int) -> dict[str, Callable[[int], Iterator[Trial]]]:
    """Functions of a number of trials, each in a folder of its own."""
    place = {name: folder / name for name in TRIALS}
    return {
        "exact": lambda count: exact(place["exact"], recipes()[:count]),
        "kill": functools.partial(kills, place["kill"], seed=seed),
        "stop": functools.partial(stops, place["stop"], seed=seed),
        "disk": functools.partial(full_disks, place["disk"], seed=seed),
        "workers": functools.partial(workers, place["workers"]),
        "moves": functools.partial(moves, place["moves"]),
        "accidents": lambda count: accidents(place["accidents"]),
        "damage": functools.partial(damaged_checkpoints, place["damage"], seed=seed),
        "fuzz": functools.partial(fuzz_all, place["fuzz"], seed=seed),
    }


def main() -> None:
    """Runs the command line; ends with 1 if a trial failed."""
    parser = argparse.ArgumentParser("make faults", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(TRIALS)}; default: all")
    parser.add_argument("--trials", type=int, help="of each part; default: as many as promised")
    parser.add_argument("--seed", type=int, default=0, help="of moments and places")
    parser.add_argument("--folder", type=pathlib.Path, help="of the runs; default: a temporary one")
    parser.add_argument("--docs", type=pathlib.Path, default=DOCS, help="folder of the report")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(TRIALS):
        parser.error(f"{', '.join(sorted(unknown))}: choose parts of {', '.join(TRIALS)}")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax, of what is compared
    results = Results(options.docs / "faults.json")
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = options.folder or pathlib.Path(temporary)
        todo, told = parts(folder, options.seed), provenance()
        for part in options.parts or TRIALS:
            count = TRIALS[part] if options.trials is None else options.trials
            shutil.rmtree(folder / part, ignore_errors=True)
            results.begin(
                part,
                {"seed": options.seed, "processor": platform.machine(), **told["versions"]},
            )
            for trial in todo[part](count):
                told = trial.told.replace(f"{folder / part}/", "")
                results.add(part, dataclasses.replace(trial, told=told))
            (options.docs / "faults.md").write_text(page(results), encoding="utf-8")
    failed = [t for trials in results.trials.values() for t in trials if t.survived != t.tried]
    sys.exit(f"{len(failed)} trials failed, see docs/faults.md" if failed else 0)


if __name__ == "__main__":
    main()
