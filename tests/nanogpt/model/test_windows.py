"""Attention by blocks against the reference: values, derivatives, second derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt.model import windows

BLOCK, SCALE = 4, 0.12
SIZES = {"block": BLOCK, "most": 5, "scale": SCALE}


@pytest.fixture(scope="module")
def inputs():
    """Three heads of two rows of eight blocks, documents that end anywhere, and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 5)
    heads = [jax.random.normal(key, (2, 32, 3, 8)) for key in keys[:4]]
    tokens = jax.random.randint(keys[4], (2, 32), 0, 9)
    return heads, windows.documents(tokens, 8)


def derivative(attend, inputs):
    """Function of a window: the result, and what a cotangent gives for queries, keys, values."""
    (q, k, v, cotangent), owners = inputs

    def both(window):
        out, pull = jax.vjp(lambda *heads: attend(*heads, owners, window, **SIZES), q, k, v)
        return out, pull(cotangent)

    return jax.jit(both)


@pytest.mark.parametrize("twice", [False, True])
def test_by_blocks_as_the_reference(inputs, twice):
    """At every window: none is one's own block, and more than the largest is the largest."""
    banded = derivative(functools.partial(windows.attend_banded, twice=twice), inputs)
    dense = derivative(windows.attend_dense, inputs)
    for window in (0, 1, 2, 5):
        ours, theirs = banded(window), dense(window)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), ours, theirs)
    jax.tree.map(np.testing.assert_array_equal, banded(9), banded(5))


def test_a_derivative_of_the_derivative(inputs):
    """As Sophia takes it: forward over reverse."""
    (q, k, v, tangent), owners = inputs

    def product(attend):
        loss = lambda q: jnp.sum(attend(q, k, v, owners, 2, **SIZES) ** 2)  # noqa: E731
        return jax.jit(lambda q: jax.jvp(jax.grad(loss), (q,), (tangent,))[1])(q)

    ours = product(functools.partial(windows.attend_banded, twice=True))
    np.testing.assert_allclose(ours, product(windows.attend_dense), atol=1e-5)


def test_results_of_narrow_heads_are_narrow(inputs):
    (q, k, v, _), owners = inputs
    narrow = [x.astype("bfloat16") for x in (q, k, v)]
    out = windows.attend_banded(*narrow, owners, 2, **SIZES)
    assert out.dtype == "bfloat16"
    expected = windows.attend_dense(q, k, v, owners, 2, **SIZES)
    np.testing.assert_allclose(out.astype("float32"), expected, atol=0.03)
