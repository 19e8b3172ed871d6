"""The report of a device, rehearsed from its start to its end: `make rehearsal`, about a minute."""

import json
import pathlib
import subprocess
import sys

import pytest

from scripts.maintenance.device import budget, prepare
from scripts.maintenance.device.sizes import REHEARSAL

ROOT = pathlib.Path(__file__).parents[3]
SHARDS = ROOT / "tests" / "golden" / "loader" / "shards"
# What a CPU cannot do; everything else of the report it can.
NOT_ON_CPU = ("is not supported by dot_general on CPU", "cuDNN", "nvidia-smi")


def report(*words):
    """Runs the command line in a process."""
    command = [sys.executable, "-m", "scripts.maintenance.device_report", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_rehearsal_runs_every_part_to_its_end(tmp_path):
    """One test, since a second worker would rehearse once more."""
    prepare.write_text(SHARDS, tmp_path, REHEARSAL)
    # So long that no part is ever ended, however busy the machine.
    words = ["--rehearse", "--minutes", 120, "--carried", tmp_path, "--out", tmp_path / "out"]
    done = report(*words)
    path = tmp_path / "out" / "rehearsal.json"
    assert path.exists(), done.stderr
    parts = json.loads(path.read_text())["parts"]
    assert list(parts) == [part.name for part in budget.PARTS]
    # Parts of which a CPU cannot do all are partial, which a rehearsal may be.
    assert {part["state"] for part in parts.values()} == {"done", "partial"}, path.with_suffix(
        ".log"
    ).read_text()[-3000:]
    assert done.returncode == 0 and done.stdout.endswith("rehearsal.md\n")
    figures = {name: part["figures"] for name, part in parts.items()}
    check_only_what_a_cpu_cannot_do_is_missing(figures)
    check_every_optimizer_has_its_parts(figures["step"]["steps"])
    check_all_train_on_the_same_batches(figures)
    check_the_page_is_written_anew(path)


def check_only_what_a_cpu_cannot_do_is_missing(figures):
    rows = [row for groups in figures.values() for found in groups.values() for row in found]
    errors = [row["error"] for row in rows if "error" in row]
    assert errors and [e for e in errors if not any(text in e for text in NOT_ON_CPU)] == []


def check_every_optimizer_has_its_parts(rows):
    steps = {row["name"]: row for row in rows}
    whole = {"rest", "statistics", "apply", "roots"}
    for every in (1, REHEARSAL.every):
        for kind in ("polynomial", "polynomial_clip", "eigh"):
            assert whole <= set(steps[f"shampoo_{kind}_{every}"])
        assert whole <= set(steps[f"one_sided_polynomial_{every}"])
        assert whole <= set(steps[f"soap_{every}"])
        assert whole - {"statistics"} <= set(steps[f"kl_shampoo_{every}"])
    assert {"adamw", "muon_5", "muon_12_bfloat16"} < set(steps)
    for row in steps.values():
        assert sum(row.get(part, 0.0) for part in whole) == pytest.approx(row["step_s"])


def check_all_train_on_the_same_batches(figures):
    names = ("train_adamw", "train_muon", "train_shampoo", "train_recipe")
    windows = [figures[name]["window"] for name in names]
    losses = [[loss for window in each for loss in window["losses"]] for each in windows]
    assert all(len(each) == REHEARSAL.steps for each in losses)
    # Equal weights and an equal batch at first, another update after it.
    assert len({each[0] for each in losses}) == 1 and len({each[-1] for each in losses}) == 4


def check_the_page_is_written_anew(path):
    page = path.with_suffix(".md")
    before = page.read_text()
    page.unlink()
    assert report("--page", path).returncode == 0
    assert page.read_text() == before
