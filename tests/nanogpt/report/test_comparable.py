"""Runs whose losses mean different things are refused, by every command that reads runs."""

import dataclasses
import json

import pytest

from nanogpt.config.presets import preset
from nanogpt.lab import compare as compare_command
from nanogpt.lab import verdict as verdict_command
from nanogpt.report.comparable import PARTS, check_comparable, common_track, departure

ALIKE = dict(zip(PARTS, "dtmv", strict=True))


def write_run(folder, optimizer, *, fingerprint, host="here", steps=10):
    start = {
        "kind": "start",
        "config": {"name": optimizer, "optimizer": optimizer, "seed": 0, "schedule": {}},
        "fingerprint": fingerprint,
        "host": host,
        "versions": {},
        "device": {"platform": "cpu", "kind": "abacus", "count": 1},
        "git_commit": None,
        "git_dirty": None,
        "parameters": 1,
        "optimizer_state_bytes": 1,
        "baselines": {},
    }
    start["config"]["schedule"]["steps"] = steps
    records = [start]
    for step in (0, steps):
        records.append({"kind": "val", "step": step, "loss": 4.0 - step / 10, "train_time_s": step})
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(folder)


def compared(tmp_path, capsys, *words):
    compare_command.main([*words, "--out", str(tmp_path / "out")])
    return capsys.readouterr().out


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("command", [compare_command, verdict_command])
def test_what_differs_is_named(tmp_path, command, part):
    one = write_run(tmp_path / "one", "adamw", fingerprint=ALIKE)
    other = write_run(tmp_path / "other", "muon", fingerprint=ALIKE | {part: "else"})
    with pytest.raises(SystemExit, match=f"error: .* cannot be compared: their {part} differs"):
        command.main([one, other])


def test_steps_may_differ_and_so_may_what_is_not_known(tmp_path, capsys):
    one = write_run(tmp_path / "one", "adamw", fingerprint=ALIKE)
    other = write_run(tmp_path / "two", "muon", fingerprint=ALIKE | {"tokenizer": None}, steps=20)
    assert "| muon |" in compared(tmp_path, capsys, one, other).lower()


def test_another_host_withholds_times_alone(tmp_path, capsys):
    one = write_run(tmp_path / "one", "adamw", fingerprint=ALIKE)
    two = write_run(tmp_path / "two", "muon", fingerprint=ALIKE)
    far = write_run(tmp_path / "far", "shampoo", fingerprint=ALIKE, host="elsewhere")
    here = compared(tmp_path, capsys, one, two)
    assert "| 10.0 |" in here and "times are left out" not in here
    apart = compared(tmp_path, capsys, one, far)
    assert "| 10.0 |" not in apart and "their times are left out" in apart
    assert "| 3.0000 |" in apart


def test_a_run_without_a_fingerprint_is_refused_by_name_unless_told(tmp_path, capsys, monkeypatch):
    one = write_run(tmp_path / "one", "adamw", fingerprint=ALIKE)
    old = write_run(tmp_path / "old", "muon", fingerprint=None)
    with pytest.raises(SystemExit, match="Muon.*: no fingerprint says .* --unchecked"):
        compare_command.main([one, old])
    with pytest.raises(SystemExit, match="old: no fingerprint"):
        verdict_command.main([one, old])
    notes = []
    monkeypatch.setattr(
        "nanogpt.report.comparison.draw", lambda *_, note, timed: notes.append(note)
    )
    compared(tmp_path, capsys, one, old, "--unchecked")
    assert notes == ["not checked to be comparable: Muon"]
    verdict_command.main([one, old, "--unchecked", "--target", "3.5"])


def test_a_curve_of_the_track_is_no_neighbour_of_a_small_model(tmp_path):
    one = write_run(tmp_path / "one", "adamw", fingerprint=ALIKE)
    curve = "t3_36_muon_tuned_3250"
    for command, words in (
        (compare_command, [one, "--reference", f"{curve}.mean.csv"]),
        (verdict_command, [one, f"{curve}.csv"]),
    ):
        with pytest.raises(SystemExit, match=f"AdamW cannot be compared with {curve}.*vocab_size"):
            command.main(words)


def test_the_targets_are_those_of_the_tracks(tmp_path, capsys):
    one = write_run(tmp_path / "one", "adamw", fingerprint=ALIKE)
    with pytest.raises(SystemExit, match="no target: .* Say by --target"):
        verdict_command.main([one])
    verdict_command.main([one, "--target", "3.5"])
    assert "(3.5 - mean)" in capsys.readouterr().out
    verdict_command.main(["t2_r08_2025-04-22_muon_5960.csv"])
    assert "(2.92 - mean)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="are of two tracks"):
        verdict_command.main(["t2_r08_2025-04-22_muon_5960.csv", "t3_36_muon_tuned_3250.csv"])


def test_differences_are_refused_even_unchecked():
    starts = {n: {"fingerprint": ALIKE | {"data": n}} for n in "ab"}
    with pytest.raises(ValueError, match="a and b cannot be compared: their data differs"):
        check_comparable(starts, unchecked=True)


FULL = dataclasses.asdict(preset("track3", "shampoo"))
SMALL = dataclasses.asdict(preset("cpu", "shampoo"))
MUON, MEDIUM = "t3_36_muon_tuned_3250", "t2_r03_weightdecay"


@pytest.mark.parametrize(
    ("published", "configs", "track"),
    [
        ([MUON], {}, "t3"),
        ([MEDIUM], {}, "t2"),
        ([MUON, "mine"], {"a": FULL}, "t3"),
        ([], {"a": FULL}, "t3"),
        ([], {"a": FULL, "b": SMALL}, None),
        (["mine"], {"a": SMALL}, None),
    ],
)
def test_the_common_track(published, configs, track):
    assert common_track(published, configs) == track


def test_a_run_of_track_3_is_not_of_the_medium_one():
    with pytest.raises(ValueError, match="a cannot be compared with t2_r03.*: it is of track 3"):
        common_track([MEDIUM], {"a": FULL})


def test_every_recipe_keeps_the_rules():
    for optimizer in ("adamw", "soap_h", "psgd"):
        assert departure(dataclasses.asdict(preset("track3", optimizer))) is None
    assert departure(FULL | {"data": FULL["data"] | {"val_tokens": 8}}) == (
        "data.val_tokens=8, the benchmark 10485760"
    )
