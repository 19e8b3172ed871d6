import json
import sys

import pytest

from data_pipeline import read_manifest
from scripts import prepare_data


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare_data", *map(str, arguments)])
    prepare_data.main()


def test_folder_from_the_command_line(tmp_path, monkeypatch, capsys):
    lines = [json.dumps({"text": f"Line {i} of the text."}) for i in range(50)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    run(monkeypatch, "folder", tmp_path / "in", "--directory", out, "--vocab-size", "300")
    printed = capsys.readouterr().out
    manifest = read_manifest(out)
    assert manifest.documents == 50
    assert manifest.source.vocab_size == 300
    assert printed.startswith(f"{out}\n")
    assert f"train {manifest.train_tokens:,} tokens" in printed
    assert f"bigram {manifest.baselines.bigram:.4f}" in printed


def test_bad_input_ends_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="^error: .*no such folder; pass a folder"):
        run(monkeypatch, "folder", tmp_path / "none", "--directory", tmp_path / "out")
