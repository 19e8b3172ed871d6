"""Residual networks: shapes, sizes, batch statistics, the loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from docs.gallery.images.resnet import DIGITS, RESNET50, apply, draw, structure
from docs.gallery.images.training import losses

SMALL = dataclasses.replace(DIGITS, stages=(1, 1), width=8)


def shapes(config, size):
    """Of parameters and statistics, and of what a network gives for two images."""
    params, stats = jax.eval_shape(lambda: draw(config, 0))
    images = jax.ShapeDtypeStruct((2, size, size, config.channels), jnp.float32)
    graphdef = structure(config)[0]
    return params, stats, jax.eval_shape(lambda *x: apply(graphdef, *x), params, stats, images)


def test_resnet50_is_that_of_the_paper():
    params, stats, (logits, after) = shapes(RESNET50, 224)
    assert sum(x.size for x in jax.tree.leaves(params)) == 25_557_032
    assert sum(x.size for x in jax.tree.leaves(stats)) == 53_120
    assert logits.shape == (2, 1000)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, stats)
    kernels = [x.shape for x in jax.tree.leaves(params) if x.ndim == 4]
    assert len(kernels) == 53


def test_images_are_halved_by_the_stem_the_middle_convolutions_and_the_shortcuts():
    config = dataclasses.replace(RESNET50, stages=(1, 1), width=8)
    params, stats, _ = shapes(config, 32)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    program = jax.make_jaxpr(functools.partial(apply, structure(config)[0]))(params, stats, images)
    halving = [
        line.invars[1].aval.shape
        for line in program.eqns
        if line.primitive.name == "conv_general_dilated" and line.params["window_strides"] == (2, 2)
    ]
    assert sorted(halving) == [(1, 1, 32, 64), (3, 3, 16, 16), (7, 7, 3, 8)]


def test_the_digits_network():
    params, _, (logits, _) = shapes(DIGITS, 8)
    assert sum(x.size for x in jax.tree.leaves(params)) == 77_754
    assert logits.shape == (2, 10)


@pytest.fixture(scope="module")
def small():
    train, use = structure(SMALL)
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)) + 1
    jitted = [jax.jit(lambda p, s, x, g=g: apply(g, p, s, x)) for g in (train, use)]
    return draw(SMALL, 0), images, *jitted


def test_a_block_starts_as_the_identity(small):
    (params, _), *_ = small
    last = [block["body"][1]["norm"]["scale"] for block in params["blocks"].values()]
    assert not any(map(np.any, last))


def test_training_normalizes_by_the_batch_and_use_by_what_was_kept(small):
    (params, stats), images, train, use = small
    in_training, after = train(params, stats, images)
    assert float(jnp.abs(after["stem"]["norm"]["mean"]).max()) > 0
    kept, same = use(params, after, images)
    jax.tree.map(np.testing.assert_array_equal, after, same)
    assert float(jnp.abs(in_training - kept).max()) > 1e-3
    # A tenth of the way to the batch's own mean.
    stem = jax.lax.conv_general_dilated(
        images, params["stem"]["conv"]["kernel"], (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    found = after["stem"]["norm"]["mean"]
    np.testing.assert_allclose(found, 0.1 * stem.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)


def test_smoothed_losses():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
    plain, smooth = (float(losses(logits, jnp.array([0]), s)[0]) for s in (0.0, 0.3))
    assert plain == pytest.approx(-np.log(0.7), rel=1e-5)
    every = -np.mean(np.log([0.7, 0.2, 0.1]))
    assert smooth == pytest.approx(0.7 * plain + 0.3 * every, rel=1e-5)
