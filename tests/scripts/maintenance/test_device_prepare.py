"""What is carried: the batches, the wheels' versions, and that all of it is small."""

import dataclasses
import pathlib

import numpy as np
import pytest

import data_pipeline
from scripts.maintenance.device import prepare
from scripts.maintenance.device.sizes import REHEARSAL
from scripts.maintenance.device.training import read_text

SHARDS = pathlib.Path(__file__).parents[2] / "golden" / "loader" / "shards"


def test_batches_are_the_loaders_and_a_run_reads_a_part_of_them(tmp_path):
    sizes = dataclasses.replace(REHEARSAL, steps=5, train_rows=3, length=16)
    prepare.write_text(SHARDS, tmp_path, sizes)
    text = read_text(tmp_path, sizes)
    batches = data_pipeline.train_batches(
        data_pipeline.shard_paths(SHARDS, "train"),
        sequence_length=16,
        batch_rows=3,
        mode="shuffled",
    )
    for rows, batch in zip(text, batches, strict=False):
        np.testing.assert_array_equal(rows[:, :-1], batch["inputs"])
        np.testing.assert_array_equal(rows[:, 1:], batch["targets"])
    smaller = dataclasses.replace(sizes, steps=2, train_rows=2, length=8)
    np.testing.assert_array_equal(read_text(tmp_path, smaller), text[:2, :2, :9])
    with pytest.raises(ValueError, match=r"\(5, 3, 17\), \(6, 3, 17\) are needed; make it with"):
        read_text(tmp_path, dataclasses.replace(sizes, steps=6))


def test_tokens_that_the_model_does_not_know_are_refused_and_the_shards_left_as_they_are(tmp_path):
    before = sorted(SHARDS.iterdir())
    sizes = dataclasses.replace(REHEARSAL, vocabulary=2)
    with pytest.raises(ValueError, match=r"token \d+ is none of the 2 of the model; prepare"):
        prepare.write_text(SHARDS, tmp_path, sizes)
    assert not list(tmp_path.iterdir()) and sorted(SHARDS.iterdir()) == before


def test_without_text_the_remedy_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no text is carried; make it with `python -m scr"):
        read_text(tmp_path, REHEARSAL)


def test_every_wheels_version_is_known():
    known = prepare.pins((prepare.ROOT / "constraints.txt").read_text())
    assert not [n for n in prepare.PACKAGES if n.lower() not in known]
    assert known["flax"] == "0.12.12"  # 0.12.8, of Python 3.11, does not run with jax 0.11


def test_what_is_carried_is_counted_and_bounded(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a.whl").write_bytes(b"x" * 2_000_000)
    (tmp_path / "text.npy").write_bytes(b"x" * 3_000_000)
    text = prepare.account(tmp_path)
    assert "text 3.0 MB, wheels 2.0 MB" in text
    monkeypatch.setattr(prepare, "LIMIT_MB", 4)
    with pytest.raises(ValueError, match="MB together, more than 4; carry less"):
        prepare.account(tmp_path)
