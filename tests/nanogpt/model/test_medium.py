"""The medium track's model: what its settings refuse, and how its kernels become bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanogpt.config.presets import preset
from nanogpt.model.gpt import cut_to
from nanogpt.model.medium import MediumBlock
from nanogpt.optimizers.schedules import window_schedule

FULL = preset("medium", "muon_mlp_decay").model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 12}, "num_layers=12: its layers differ"),
        ({"attention": "cudnn"}, "cuDNN knows no documents"),
        ({"window": 3500}, "window=3500: must be a multiple of mask_block=128"),
        ({"sequence_length": 100}, "sequence_length=100: must be a multiple of mask_block"),
        ({"head_columns": 50000}, "head_columns=50000: must be at least vocab_size=50257"),
        ({"end_of_text": 50257}, "end_of_text=50257: must be below vocab_size=50257"),
        ({"model_dim": 1024, "head_dim": 1024}, "head_dim=1024: attention by blocks takes at most"),
        ({"kind": "track3"}, "'dense' and 'medium' are of kind='medium'"),
    ],
)
def test_settings_that_it_has_not(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FULL, **changes)


def test_rows_of_validation_are_whole_blocks():
    run = preset("medium", "muon_mlp_decay")
    with pytest.raises(ValueError, match="val_length=100: must be a multiple of mask_block=128"):
        dataclasses.replace(run, data=dataclasses.replace(run.data, val_length=100))


def test_kernels_are_cut_and_pull_back_as_casts_do():
    x = jnp.array([1.999, -1.999, 1e-3, 0.0])
    cut, pull = jax.vjp(lambda x: cut_to(x, jnp.dtype("bfloat16")), x)
    assert (jnp.abs(cut.astype("float32")) <= jnp.abs(x)).all()
    assert float(cut[0]) == 2 - 2.0**-7
    np.testing.assert_array_equal(pull(jnp.ones(4, "bfloat16"))[0], np.ones(4))


def test_kernels_that_are_cut_begin_as_bfloat16():
    """Uniform with std 0.5 / sqrt(fan_in), as far as its bound; projections at 0."""
    small = dataclasses.replace(FULL, model_dim=64, head_dim=64, mlp_dim=256)
    block = MediumBlock(small, nnx.Rngs(0), 0)
    fc = np.asarray(block.mlp.fc.kernel[...])
    assert (fc == fc.astype(jnp.bfloat16).astype("float32")).all()
    assert fc.std() == pytest.approx(0.5 / 8, rel=0.02)
    assert abs(fc).max() == pytest.approx(3**0.5 * 0.5 / 8, rel=0.01)
    assert not block.mlp.proj.kernel[...].any() and block.mlp.fc.bias is None
    nearest = MediumBlock(dataclasses.replace(small, kernel_rounding="nearest"), nnx.Rngs(0), 0)
    kernel = np.asarray(nearest.mlp.fc.kernel[...])
    assert (kernel != kernel.astype(jnp.bfloat16).astype("float32")).any()


def test_the_window_follows_the_length_of_the_run():
    """Half of the steps: half of the window, by the symmetry of its polynomial about 1/2."""
    run = preset("medium_board", "adamw")
    windows = window_schedule(run)
    assert [int(windows(s)) for s in (0, 300, 600)] == [1, 14, 27]
    assert (np.diff(windows(np.arange(601))) >= 0).all()
