"""The command that draws any set of runs."""

import sys

import pytest

from nanogpt.lab import compare
from nanogpt.report import comparison


def test_arguments_reach_the_comparison(monkeypatch, tmp_path, capsys):
    seen = []

    def record(runs, out, references, *, unchecked):
        seen.append((runs, out, references, unchecked))
        (out / "comparison.md").write_text("| table |")
        return out / "comparison.png"

    monkeypatch.setattr(comparison, "compare", record)
    a, b, c = (tmp_path / name for name in "abc")
    command = ["compare", str(a), str(b), "--out", str(tmp_path), "--reference", str(c)]
    monkeypatch.setattr(sys, "argv", command)
    compare.main()
    assert seen == [((a, b), tmp_path, (c,), False)]
    printed = capsys.readouterr().out
    assert "| table |" in printed and str(tmp_path / "comparison.png") in printed


def test_missing_run_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "none"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: .*none.*is not the folder of a run"):
        compare.main()


def test_a_folder_that_cannot_be_is_a_line(monkeypatch, tmp_path):
    """Any error of the file system is."""
    (tmp_path / "file").touch()

    def make(runs, out, references, *, unchecked):
        out.mkdir(parents=True)

    monkeypatch.setattr(comparison, "compare", make)
    with pytest.raises(SystemExit, match="error: .*Not a directory.*file"):
        compare.main([str(tmp_path), "--out", str(tmp_path / "file" / "out")])
