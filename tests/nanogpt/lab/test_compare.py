"""The command that draws any set of runs."""

import json

import pytest

from nanogpt.lab import look
from nanogpt.report import comparison


def test_arguments_reach_the_comparison(monkeypatch, tmp_path, capsys):
    seen = []

    def record(runs, out, references, *, unchecked, target):
        seen.append((runs, out, references, unchecked, target))
        (out / "comparison.md").write_text("| table |")
        return out / "comparison.png"

    monkeypatch.setattr(comparison, "compare", record)
    a, b, c = (tmp_path / name for name in "abc")
    look.compare([str(a), str(b), "--out", str(tmp_path), "--reference", str(c)])
    assert seen == [((str(a), str(b)), tmp_path, (c,), False, None)]
    printed = capsys.readouterr().out
    assert "| table |" in printed and str(tmp_path / "comparison.png") in printed


def test_missing_run_is_named(tmp_path):
    with pytest.raises(SystemExit, match="error: .*none.*is not the folder of a run"):
        look.compare([str(tmp_path / "none"), "--out", str(tmp_path)])


@pytest.mark.parametrize("command", [look.compare, look.records])
def test_where_nothing_can_be_written_is_said_in_a_line(tmp_path, monkeypatch, command):
    (tmp_path / "file").write_text("")
    runs = []
    if command is look.compare:
        monkeypatch.setattr(comparison, "check_comparable", lambda *_, **__: [])
        monkeypatch.setattr(comparison, "report", lambda runs: "")
        start = {
            "kind": "start",
            "config": {"optimizer": "adamw", "name": "a"},
            "device": {},
            "baselines": {},
        }
        val = {"kind": "val", "step": 1, "loss": 1.0, "train_time_s": 1.0}
        (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(val)}\n")
        runs = [str(tmp_path)]
    with pytest.raises(SystemExit, match="error: .*Not a directory"):
        command([*runs, "--out", str(tmp_path / "file" / "x")])
    with pytest.raises(SystemExit, match="error: out='gs://b/x': must be a folder of this machine"):
        command([*runs, "--out", "gs://b/x"])
