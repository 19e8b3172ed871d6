"""Mutants of JSON have another form, whole files are misplaced, and trials are counted by kind."""

import json
import random

from scripts.maintenance.faulting.fuzz import misplace
from scripts.maintenance.faulting.mutants import mutate
from scripts.maintenance.faulting.outcome import Results, Trial

TREE = {"a": [1, {"b": "c"}], "d": 2.5}


def test_json_loses_names_or_has_other_values_and_stays_json():
    chance = random.Random(0)
    lost, other = (
        [json.loads(mutate(json.dumps(TREE).encode(), chance, kind)) for _ in range(40)]
        for kind in ("lose", "retype")
    )
    assert {"d": 2.5} in lost and {"a": TREE["a"]} in lost and {"a": [1], "d": 2.5} in lost
    assert all(tree != TREE for tree in lost) and sum(tree != TREE for tree in other) > 35
    lines = b'{"kind": "start"}\n{"kind": "val", "step": 3}\n'
    changed = [mutate(lines, chance, "lose").split(b"\n") for _ in range(40)]
    assert all(len(found) == 2 for found in changed) and [b'{"step": 3}'] in [
        c[1:] for c in changed
    ]


def test_whole_files_are_misplaced(tmp_path):
    done = set()
    for seed in range(30):
        one, two = tmp_path / "one", tmp_path / "two"
        one.write_text("1"), two.write_text("2")
        what = misplace(one, two, random.Random(seed))
        done.add(what)
        assert one.is_dir() == (what == "folder")
        assert one.is_file() == (what == "exchanged")
        assert (what == "exchanged") == (two.read_text() == "1")
        for path in tmp_path.iterdir():
            path.rmdir() if path.is_dir() else path.unlink()
    assert done == {"deleted", "renamed", "exchanged", "folder"}


def test_trials_are_kept_and_counted(tmp_path):
    path = tmp_path / "faults.json"
    results = Results(path)
    results.begin("kill", {"seed": 0})
    for trial in (Trial("kill", "a", True, True), Trial("kill", "b", False, False, "why")):
        results.add("kill", trial)
    assert Results(path).trials == results.trials
    (row,) = json.loads(path.read_text())["table"]
    assert row == {"fault": "kill", "tried": 2, "survived": 1, "resumed": 2, "exact": 1}
