"""The committed page is what the command writes from the committed curves, and takes our runs."""

import dataclasses
import json
import pathlib

import pytest

from nanogpt.config.presets import preset
from nanogpt.lab import look
from nanogpt.report import records

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Runs the command on some folders; returns the page."""
    monkeypatch.setattr(records, "draw_board", lambda groups, out, **_: out / "track3.png")

    def run(*folders):
        look.records([*map(str, folders), "--out", str(tmp_path)])
        return (tmp_path / "track3.md").read_text()

    return run


def test_committed_page_is_up_to_date(write):
    assert write() == (ROOT / "docs" / "leaderboard" / "track3.md").read_text()


def test_every_published_result_of_track_3_is_listed():
    files = {path.name for path in (ROOT / "nanogpt" / "report" / "published").glob("t3_*.csv")}
    listed = {
        f"{entry[column]}.csv" for entry in records.read_results() for column in ("file", "drawn")
    }
    missing = {name for name in files - listed if not name.endswith(".mean.csv")}
    assert missing == {"t3_12b_muon_3150_ablation.csv"}


def test_runs_of_ours_stand_beside_them(write, tmp_path):
    for seed in (0, 1):
        config = dataclasses.asdict(preset("track3", "shampoo")) | {"seed": seed}
        start = {"kind": "start", "config": config, "fingerprint": {"data": "d"}}
        start["device"] = {"platform": "gpu", "kind": "NVIDIA H100 80GB HBM3", "count": 8}
        losses = ((0, 10.8), (3375, 3.275 + 0.001 * seed))
        validations = [
            {"kind": "val", "step": step, "loss": loss, "train_time_s": 0.4 * step}
            for step, loss in losses
        ]
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        end = {"kind": "end", "step": 3375}
        lines = [json.dumps(record) for record in [start, *validations, end]]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
    page = write(tmp_path)
    assert "Runs of this project: Shampoo, this project." in page
    row = "| 2 | 3375 | 3.27550 | 0.00071 | 0.00636 | accepted | 3375 | - |"
    assert f"| Shampoo, this project {row}" in page
    assert "| 400 | 427.7 | 8 x NVIDIA H100 80GB HBM3 |" in page
    (group,) = records.own_groups([tmp_path])
    assert group.timed and not group.reference


def test_runs_of_another_size_do_not_stand_beside_them(tmp_path):
    """A smaller model's loss on other text may well be below 3.28."""
    start = {"kind": "start", "config": dataclasses.asdict(preset("board", "adamw"))}
    start["fingerprint"] = {"data": "d"}
    start["device"] = {"platform": "cpu", "kind": "abacus", "count": 1}
    end = {"kind": "val", "step": 1, "loss": 3.0, "train_time_s": 1.0}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(end)}\n")
    with pytest.raises(
        ValueError, match=r"board-adamw cannot.* has model\.vocab_size=1024, the benchmark"
    ):
        records.own_groups([tmp_path])


def test_missing_curves_are_named(tmp_path):
    with pytest.raises(
        SystemExit, match=r"error: .*t3_01_muon_3600.csv does not exist: --curves must"
    ):
        look.records(["--curves", str(tmp_path)])
