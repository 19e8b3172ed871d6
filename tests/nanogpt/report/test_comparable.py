"""Runs whose losses mean different things are refused, by every command that reads runs."""

import dataclasses
import json

import pytest
from matplotlib.figure import Figure

from data_pipeline import download
from nanogpt.config.presets import preset
from nanogpt.lab import look
from nanogpt.report import comparison
from nanogpt.report.comparable import PARTS, TEXT, check_comparable, common_track, departure

ALIKE = dict(zip(PARTS, "dtmv", strict=True))


def write_run(folder, optimizer, *, fingerprint, host="here", steps=10, end: str | None = "end"):
    config = {"name": optimizer, "optimizer": optimizer, "seed": 0, "schedule": {}}
    start = {
        "kind": "start",
        "config": config,
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
    config["schedule"]["steps"] = steps
    records = [start]
    for step in (0,) if end == "diverged" else (0, steps):
        records.append({"kind": "val", "step": step, "loss": 4.0 - step / 10, "train_time_s": step})
    if end:
        records.append({"kind": end, "step": steps})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(folder)


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """What pictures show is no matter here."""
    monkeypatch.setattr(comparison, "figure_of", lambda *_, **__: Figure(figsize=(1, 1)))


def compared(tmp_path, capsys, *words):
    look.compare([*words, "--out", str(tmp_path / "out")])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [look.compare, look.verdict])
def test_runs_of_one_name_in_two_folders_are_two_runs(tmp_path, command):
    one = write_run(tmp_path / "one" / "adamw", "adamw", fingerprint=ALIKE)
    two = write_run(tmp_path / "two" / "adamw", "adamw", fingerprint=ALIKE | {"model": "else"})
    with pytest.raises(SystemExit, match=f"{one} and {two} cannot be compared: their model"):
        command([one, two])


def test_runs_of_one_name_are_drawn_by_their_folders(tmp_path, capsys):
    one, two = (write_run(tmp_path / n / "a", "adamw", fingerprint=ALIKE) for n in ("one", "two"))
    printed = compared(tmp_path, capsys, one, two)
    assert f"| AdamW {one} |" in printed and f"| AdamW {two} |" in printed


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("command", [look.compare, look.verdict])
def test_what_differs_is_named(tmp_path, command, part):
    one = write_run(tmp_path / "one", "adamw", fingerprint=ALIKE)
    other = write_run(tmp_path / "other", "muon", fingerprint=ALIKE | {part: "else"})
    with pytest.raises(SystemExit, match=f"error: .* cannot be compared: their {part} differs"):
        command([one, other])


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
    with pytest.raises(SystemExit, match="old: no fingerprint says .* --unchecked"):
        look.compare([one, old])
    with pytest.raises(SystemExit, match="old: no fingerprint"):
        look.verdict([one, old])
    notes = []
    figure = lambda *_, note, **__: notes.append(note) or Figure(figsize=(1, 1))  # noqa: E731
    monkeypatch.setattr(comparison, "figure_of", figure)
    compared(tmp_path, capsys, one, old, "--unchecked")
    assert set(notes) == {"not checked to be comparable: Muon"}
    look.verdict([one, old, "--unchecked", "--target", "3.5"])


def test_a_curve_of_the_track_is_no_neighbour_of_a_small_model(tmp_path):
    one = write_run(tmp_path / "one", "adamw", fingerprint=ALIKE)
    curve = "t3_36_muon_tuned_3250"
    for command, words in (
        (look.compare, [one, "--reference", f"{curve}.mean.csv"]),
        (look.verdict, [one, f"{curve}.csv"]),
    ):
        with pytest.raises(SystemExit, match=f"cannot be compared with {curve}.*vocab_size"):
            command(words)


def test_the_targets_are_those_of_the_tracks(tmp_path, capsys):
    one = write_run(tmp_path / "one", "adamw", fingerprint=ALIKE)
    with pytest.raises(SystemExit, match="no target: .* Say by --target"):
        look.verdict([one])
    for target in ("nan", "inf", "0", "-1"):
        with pytest.raises(SystemExit, match="must be positive and finite"):
            look.verdict([one, "--target", target])
    look.verdict([one, "--target", "3.5"])
    assert "(3.5 - mean)" in capsys.readouterr().out
    look.verdict(["t2_r08_2025-04-22_muon_5960.csv"])
    assert "(2.92 - mean)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="are of two tracks"):
        look.verdict(["t2_r08_2025-04-22_muon_5960.csv", "t3_36_muon_tuned_3250.csv"])


def test_differences_are_refused_even_unchecked():
    starts = {n: {"fingerprint": ALIKE | {"data": n}} for n in "ab"}
    with pytest.raises(ValueError, match="a and b cannot be compared: their data differs"):
        check_comparable(starts, unchecked=True)


def test_what_is_not_finished_is_marked(tmp_path, capsys):
    """A diverged run has no loss at its end, not the one of its last validation."""
    cut = write_run(tmp_path / "cut", "muon", fingerprint=ALIKE, end=None)
    bad = write_run(tmp_path / "bad", "lion", fingerprint=ALIKE, steps=20, end="diverged")
    good = write_run(tmp_path / "good", "adamw", fingerprint=ALIKE)
    look.verdict([cut, bad, good, "--target", "2.5"])
    printed = capsys.readouterr().out
    assert "| Muon (unfinished) | 1 | 10 | 3.00000 |" in printed
    assert "| lion (diverged) | 1 | 20 | nan | - | nan | not accepted | none |" in printed
    assert "| AdamW | 1 | 10 | 3.00000 |" in printed
    assert "| lion (diverged) | AdamW | nan | not proven |" in printed
    assert "| lion | 20 | diverged |" in compared(tmp_path, capsys, bad, good)


FULL = {"config": dataclasses.asdict(preset("track3", "shampoo"))}
SMALL = {"config": dataclasses.asdict(preset("cpu", "shampoo"))}
MUON, MEDIUM = "t3_36_muon_tuned_3250", "t2_r03_weightdecay"
LARGE = {"config": dataclasses.asdict(preset("medium", "shampoo"))}


@pytest.mark.parametrize(
    ("published", "configs", "track"),
    [
        ([MUON], {}, "t3"),
        ([MEDIUM], {}, "t2"),
        ([MUON, "mine"], {"a": FULL}, "t3"),
        ([], {"a": FULL}, "t3"),
        ([], {"a": FULL, "b": SMALL}, None),
        (["mine"], {"a": SMALL}, None),
        ([MEDIUM], {"a": LARGE}, "t2"),
        ([], {"a": LARGE}, "t2"),
        ([], {"a": LARGE, "b": FULL}, None),
    ],
)
def test_the_common_track(published, configs, track):
    assert common_track(published, configs) == track


def test_a_run_of_track_3_is_not_of_the_medium_one():
    with pytest.raises(
        ValueError, match="a cannot be compared with t2_r03.*: it has model.vocab_size=50304"
    ):
        common_track([MEDIUM], {"a": FULL})
    with pytest.raises(ValueError, match=f"a cannot be compared with {MUON}"):
        common_track([MUON], {"a": LARGE})


def test_every_recipe_keeps_the_rules():
    for optimizer in ("adamw", "soap_h", "psgd"):
        assert departure({"config": dataclasses.asdict(preset("track3", optimizer))}) is None


def test_a_run_from_before_there_were_multipliers_keeps_the_rules():
    config = dataclasses.asdict(preset("track3", "shampoo"))
    del config["model"]["width_multiplier"], config["model"]["depth_multiplier"]
    assert departure({"config": config}) is None


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ({"data.val_tokens": 8}, "data.val_tokens=8, the benchmark 10485760"),
        ({"model.width_multiplier": 2.0}, "model.width_multiplier=2.0, the benchmark 1.0"),
        ({"model.depth_multiplier": 0.5}, "model.depth_multiplier=0.5, the benchmark 1.0"),
        ({"init_from": "runs/x"}, "init_from='runs/x', the benchmark begins with none"),
    ],
)
def test_settings_that_leave_the_rules(change, left):
    config = preset("track3", "shampoo")
    for path, value in change.items():
        part, _, name = path.rpartition(".")
        inner = dataclasses.replace(getattr(config, part), **{name: value}) if part else value
        config = dataclasses.replace(config, **{part or name: inner})
    assert departure({"config": dataclasses.asdict(config)}) == left


def test_the_text_of_track_3_is_what_is_downloaded(tmp_path):
    """Of a run on it, as of one on shards without a manifest, nothing is held against it."""
    val, train = download.missing(tmp_path, 1)
    source, text = download.SOURCE, {"shards": f"{train} and {val}"}
    text["tokenizer"] = f"{source.tokenizer} {source.vocab_size} {source.merges_sha256[:12]}"
    assert text == TEXT
    for told in (text, text | {"tokenizer": None}, {"data": "d"}):
        assert departure(FULL | {"fingerprint": told}) is None
    for name in text:
        other = departure(FULL | {"fingerprint": text | {name: "mine"}})
        assert other == f"{name} 'mine', the benchmark {text[name]!r}"
