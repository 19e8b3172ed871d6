"""Seconds of whole runs on S for docs/recipe.md, of the recipe with fewer steps and of AdamW.

    python -m scripts.maintenance.ablation_time
    taskset -c 0 python -m scripts.maintenance.ablation_time

They take turns, with nothing beside them, so that a machine whose speed changes tells as much as
one that keeps it. Rates are those of the runs that are kept; docs/recipe/time.jsonl has a line a
run, and those of another number of cores stay.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from nanogpt.lab import compile_cache
from nanogpt.lab.shared_programs import run_shared
from nanogpt.lab.trials import Trial, read_trials
from nanogpt.train.metrics import read_records
from scripts.maintenance.ablation_points import ABLATING, Run, make_config, make_points
from scripts.maintenance.ablation_tables import last_runs
from scripts.maintenance.ablation_texts import check_texts
from scripts.maintenance.ablations import RUNS

TIMED = ("adamw", "shampoo_next", "245 steps blocks", "250 steps one side")
TURNS = len(ABLATING)


def runs_told(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[Run]]:
    """Of every point the runs whose loss the page tells, one a seed.

    Raises:
        ValueError: a point has not all of them.
    """
    told = last_runs([Run(**record["settings"]) for record in records], ABLATING)
    missing = [n for n in names if len(told.get(n, ())) < TURNS]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: no {TURNS} runs in {RUNS}; train them first: python -m "
            f"scripts.maintenance.ablations --points {' '.join(map(repr, missing))}."
        )
    return {name: [told[name][seed] for seed in ABLATING] for name in names}


def replace_times(path: pathlib.Path, cores: int, times: Sequence[Mapping[str, Any]]) -> None:
    """Writes times of a number of cores in the place of those that were there."""
    records = read_records(path) if path.exists() else []
    others = [record for record in records if record["cores"] != cores]
    new = [{"kind": "time", "cores": cores, **time} for time in times]
    lines = [json.dumps(record) for record in (*others, *new)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Times all of them in turns."""
    compile_cache.prepare()
    points = {point.name: point for point in make_points()}
    records = read_trials(RUNS)
    told = runs_told(records, TIMED)
    trials = {
        name: [Trial(run._asdict(), make_config(points[name], run)) for run in runs]
        for name, runs in told.items()
    }
    starts = [run_shared(trials[name][0])["start"] for name in TIMED]  # compiles
    check_texts({"board": starts[0]["fingerprint"]["data"]}, records)
    device, times = starts[0]["device"]["kind"], list[dict[str, Any]]()
    for turn in range(TURNS):
        for name in TIMED:
            trial = trials[name][turn]
            seconds = run_shared(trial)["step_time_s"] * trial.config.schedule.steps
            time = {"point": name, "turn": turn, "seconds": round(seconds, 3), "device": device}
            times.append(time)
            print(time, flush=True)
    replace_times(RUNS.with_name("time.jsonl"), len(os.sched_getaffinity(0)), times)


if __name__ == "__main__":
    main()
