"""Ablations in time: which runs are timed, and the file of their seconds."""

import pytest

from nanogpt.train.metrics import read_records
from scripts.maintenance.ablation_points import ABLATING, Run
from scripts.maintenance.ablation_time import TIMED, replace_times, runs_told


def record(name, seed, rate=0.0, board="board"):
    return {"settings": Run(name, rate, 0.0, seed, "board", board)._asdict()}


def test_the_runs_that_are_told_are_timed_at_their_last_rates():
    older = [record("adamw", seed, 1.0) for seed in ABLATING]
    records = [*older, *(record("adamw", seed) for seed in (*ABLATING, 400))]
    records += [record("adamw", ABLATING[0], 2.0, "board_m")]
    assert runs_told(records, ["adamw"]) == {"adamw": [Run("adamw", 0.0, 0.0, s) for s in ABLATING]}


def test_points_that_were_not_trained_are_named():
    records = [record(name, seed) for name in TIMED[1:] for seed in ABLATING]
    with pytest.raises(ValueError, match=r"adamw: no 8 runs.*--points 'adamw'"):
        runs_told(records, TIMED)


def test_seconds_of_another_number_of_cores_stay(tmp_path):
    path = tmp_path / "time.jsonl"
    for cores, seconds in ((1, 6.0), (2, 4.0), (1, 5.0)):
        replace_times(path, cores, [{"point": "adamw", "turn": 0, "seconds": seconds}])
    assert [(r["cores"], r["seconds"]) for r in read_records(path)] == [(2, 4.0), (1, 5.0)]
