"""Which runs make a set."""

import json
import math

import pytest

from nanogpt.report.curves import Curve
from nanogpt.report.groups import Group, read_groups

CSV = "run,step,val_loss,train_time_s,val_ema_loss\n0,0,5.0,0.0,4.0\n1,0,7.0,0.0,6.0\n"


def write_run(folder, optimizer, seed, rate=0.1):
    config = {
        "name": folder.name,
        "optimizer": optimizer,
        "seed": seed,
        "output": {"directory": str(folder)},
    }
    start = {
        "kind": "start",
        "fingerprint": {"data": "d", "tokenizer": "t", "model": "m", "validation": "v"},
        "config": config | {"matrices": {"learning_rate": rate}},
        "device": {"platform": "cpu", "kind": "abacus", "count": 2},
    }
    end = {"kind": "end", "step": 10}
    validations = [
        {"kind": "val", "step": step, "loss": 5.0 - step / 10 + seed, "train_time_s": 0.5 * step}
        for step in (0, 10)
    ]
    folder.mkdir(parents=True)
    text = "".join(json.dumps(record) + "\n" for record in [start, *validations, end])
    (folder / "metrics.jsonl").write_text(text)


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "runs" / "adamw" / f"seed{seed}", "adamw", seed)
        write_run(tmp_path / "runs" / f"muon-seed{seed}", "muon", seed)
    return tmp_path / "runs"


def test_runs_that_differ_in_the_seed_alone_make_a_set(runs):
    groups = read_groups([runs])
    assert [(group.label, len(group.runs)) for group in groups] == [("AdamW", 2), ("Muon", 2)]
    assert [run.losses for run in groups[0].runs] == [(5.0, 4.0), (6.0, 5.0)]
    assert groups[0].curve == ("AdamW", (0, 10), (5.5, 4.5), (0.0, 5.0))
    assert groups[0].seconds_per_step == 0.5
    assert groups[0].machine == "2 x abacus" and groups[0].start["config"]["optimizer"] == "adamw"


def test_other_settings_make_another_set_that_is_told_apart(runs):
    write_run(runs / "z", "muon", 0, rate=0.2)
    labels = [(group.label, len(group.runs)) for group in read_groups([runs])]
    assert labels == [("AdamW", 2), ("Muon muon-seed0", 2), ("Muon z", 1)]


def test_a_run_that_is_named_twice_counts_once(runs):
    assert len(read_groups([runs / "adamw" / "seed0", runs / "adamw"])[0].runs) == 2


def test_a_repeated_seed_is_no_second_run(runs):
    """As that of a run of its own beside those of --seeds, below it."""
    write_run(runs / "adamw" / "seed0" / "seed-0", "adamw", 0)
    with pytest.raises(ValueError, match="adamw/seed0 and .*seed-0 are runs of the same setting"):
        read_groups([runs])
    assert len(read_groups([runs / "adamw" / "seed0" / "seed-0"])) == 1


def test_a_csv_file_is_a_set(runs, tmp_path):
    path = tmp_path / "t3_x.csv"
    path.write_text(CSV)
    groups = read_groups([path, runs], "val_ema_loss")
    assert [group.label for group in groups] == ["AdamW", "Muon", "t3_x"]
    assert [run.losses for run in groups[-1].runs] == [(4.0,), (6.0,)]
    assert math.isnan(groups[-1].seconds_per_step)
    assert [group.reference for group in groups] == [False, False, True]


@pytest.mark.parametrize(
    ("paths", "error", "message"),
    [
        ((), ValueError, "no runs: name folders"),
        (("missing",), FileNotFoundError, "missing does not exist or holds no metrics.jsonl"),
    ],
)
def test_nothing_to_read(tmp_path, paths, error, message):
    with pytest.raises(error, match=message):
        read_groups([tmp_path / path for path in paths])


def test_a_drawn_curve_replaces_the_mean():
    finals = [Curve(str(loss), (9,), (loss,), (math.nan,)) for loss in (3.0, 4.0)]
    group = Group("x", finals, drawn=Curve("one", (0, 9), (5.0, 3.5), (0.0, 18.0)))
    assert group.curve == ("x", (0, 9), (5.0, 3.5), (0.0, 18.0))
    assert group.seconds_per_step == 2.0
