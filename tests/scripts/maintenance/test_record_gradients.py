"""Recording: the very gradients of the run, in the steps asked for, through a file and back."""

import numpy as np
import pytest

from data_pipeline import write_shard
from nanogpt.config.run import (
    AuxiliaryConfig,
    Config,
    DataConfig,
    ModelConfig,
    ScheduleConfig,
)
from nanogpt.config.settings import AdamWConfig
from scripts.maintenance.record_gradients import Wanted, parse, read_gradients, record, write
from tests.oracles.gradients import recorded_gradients


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.random.default_rng(0).integers(0, 16, 2000).astype(np.uint16)
    write_shard(folder / "t_train_000001.bin", tokens)
    write_shard(folder / "t_val_000000.bin", tokens[:200])
    return Config(
        name="recording",
        seed=0,
        model=ModelConfig(16, 1, 8, 8, 16, 8, dtype="float32", embed_dtype="float32"),
        data=DataConfig(str(folder), "sequential", 2, 2, val_tokens=16),
        schedule=ScheduleConfig(8),
        optimizer="adamw",
        matrices=AdamWConfig(0.01, weight_decay=0.1),
        auxiliary=AuxiliaryConfig(0.1, 0.01, 0.01),
    )


def test_two_windows_of_one_run_agree_where_they_overlap(config):
    path = "blocks/0/mlp/fc"
    found = record(config, [Wanted(3, path, None), Wanted(4, path, 5)], steps=3)
    early, late = found[f"3:{path}"], found[f"4:{path}"]
    assert early.shape == (3, 8, 16) and late.shape == (3, 8, 5)
    np.testing.assert_array_equal(early[1:, :, :5], late[:2])
    assert np.all(np.abs(np.diff(early, axis=0)).max((1, 2)) > 0)


def test_a_file_keeps_eleven_bits_of_any_scale_and_zeros(tmp_path):
    gradients = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    gradients *= np.array([1e-20, 0.0, 1e20], np.float32)[:, None, None]
    write(tmp_path / "g.npz", {"7:w": gradients}, {"command": "none"})
    read = read_gradients(tmp_path / "g.npz")["7:w"]
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, gradients, rtol=2**-11)


@pytest.mark.parametrize(
    ("wanted", "steps", "message"),
    [
        ("0:blocks/0/attn/x", 1, "no matrix 'blocks/0/attn/x/kernel'"),
        ("6:blocks/0/attn/q", 3, "steps=3: from 1 to what lies between .* 6, and .* run, 8"),
    ],
)
def test_what_cannot_be_recorded_is_refused(config, wanted, steps, message):
    with pytest.raises(ValueError, match=message):
        record(config, [parse(wanted)], steps)


def test_an_unreadable_wish_is_refused():
    with pytest.raises(ValueError, match="wanted='early:q': write STEP:MATRIX"):
        parse("early:q")


def test_the_committed_recording_is_what_its_readme_says():
    shapes = {name: g.shape for name, g in recorded_gradients().items()}
    assert [name.split(":")[0] for name in shapes] == ["5", "5", "100", "100", "250", "250"]
    assert shapes["100:blocks/3/mlp/fc"] == (12, 128, 256)
    assert all(shape[0] == 12 and shape[1] == 128 for shape in shapes.values())
