"""Initial weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanogpt.model.gpt import GPT
from nanogpt.model.init import embedding_normal, linear, linear_normal
from nanogpt.train.train_step import model_structure, summed_loss
from scripts.maintenance.parity import golden

SHAPE = dict(vocab=256, layers=2, dim=64, head_dim=32, T=16)


@functools.partial(jax.jit, static_argnames="config")
def draw(config, seed):
    return nnx.to_pure_dict(nnx.state(GPT(config, nnx.Rngs(jax.random.key(seed))), nnx.Param))


def params(seed):
    return golden.by_path(draw(golden.model_config(SHAPE), seed))


@pytest.mark.trap("A3", "A4")
def test_a3_a4_zeros_ones_and_normals():
    zero = ("attn/proj/kernel", "mlp/proj/kernel", "head/kernel", "bias")
    for name, value in params(0).items():
        if name.endswith(zero):
            assert not value.any(), name
        elif name.endswith("scale"):
            assert (value == 1).all(), name
        elif name.endswith("kernel"):
            np.testing.assert_allclose(value.std(), (0.33 / 64) ** 0.5, rtol=0.05, err_msg=name)
        else:
            np.testing.assert_allclose(value.std(), 1.0, rtol=0.05, err_msg=name)


@pytest.mark.trap("A4")
def test_a4_kernels_are_not_truncated_and_not_uniform():
    """33 out of 1e6 normal draws lie beyond 4 sigma; the truncated initializer stops near 2."""
    kernel = np.asarray(linear_normal(jax.random.key(0), 1000, 1000)) / (0.33 / 1000) ** 0.5
    np.testing.assert_allclose(kernel.std(), 1.0, atol=4e-3)
    np.testing.assert_allclose(np.abs(kernel).mean(), (2 / np.pi) ** 0.5, atol=4e-3)
    np.testing.assert_allclose((kernel**4).mean(), 3.0, atol=0.03)
    assert (np.abs(kernel) > 4).sum() > 20


@pytest.mark.trap("A4")
def test_a4_embedding_is_a_rounded_float32_draw():
    """Rounded from float32, not drawn in bfloat16, whose draws lie on a coarser grid."""
    key = jax.random.key(3)
    wide = embedding_normal(key, 100, 64, "float32")
    np.testing.assert_array_equal(
        embedding_normal(key, 100, 64, "bfloat16"), wide.astype(jnp.bfloat16)
    )


@pytest.mark.trap("A10", "A15", "R1")
def test_r1_seed_changes_weights_but_not_the_first_loss():
    """The loss before the first step is ln V whatever the draw; ln 50304 = 10.82584.

    So no column of the padded head is masked (A10), and no target, not even the separator of
    documents 50256, nor the last of a row (A15).
    """
    first, second = params(0), params(1)
    assert not np.array_equal(first["embed/embedding"], second["embed/embedding"])
    assert not np.array_equal(first["blocks/0/attn/q/kernel"], first["blocks/1/attn/q/kernel"])
    tokens = np.arange(50256 - 31, 50257, dtype=np.int32).reshape(2, 16)
    batch = {"inputs": tokens, "targets": tokens}
    config = golden.model_config(
        SHAPE, vocab_size=50304, num_layers=1, dtype="bfloat16", embed_dtype="bfloat16"
    )
    graphdef = model_structure(config)
    loss = jax.jit(lambda p: summed_loss(graphdef, p, batch)[1] / 32)
    for seed in (0, 1):
        assert f"{loss(draw(config, seed)):.5f}" == "10.82584"


@pytest.mark.parametrize(
    ("name", "role", "kernel", "bias"),
    [
        ("record2", "qkv", 3**-0.5, 3**-0.5),
        ("record2", "mlp_proj", 0.0, 0.0),
        ("record2", "head", 0.0, 0.0),
        ("record27", "fc", 1.5 * 3**-0.5, 3**-0.5),
        ("record27", "mlp_proj", 3 * 3**-0.5, 0.0),
        ("record27", "attn_proj", 1.25 * 3**-0.5, 0.0),
        ("record27", "head", 0.0, 0.0),
        ("record33", "fc", 1.5 * 3**-0.5, 3**-0.5),
        ("record33", "mlp_proj", 3 * 3**-0.5, 3**-0.5),
        ("record33", "head", 3**-0.5, 3**-0.5),
    ],
)
def test_a3_starts_of_other_results(name, role, kernel, bias):
    """Standard deviations times sqrt(fan_in); U(-1, 1) has 3^-0.5."""
    keys = iter(jax.random.split(jax.random.key(0)))
    drawn = linear(name, role, 400, 300, lambda: next(keys))
    for value, expected in zip(drawn, (kernel, bias), strict=True):
        np.testing.assert_allclose(value.std() * 20, expected, rtol=0.1, atol=0)
    uniform = name != "record33" or role == "head"
    if kernel:
        assert (np.abs(drawn[0]).max() * 20 <= kernel * 3**0.5) == uniform
