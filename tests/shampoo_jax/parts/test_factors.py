"""Factor statistics against contractions in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_jax.blocks.blocks import Blocks
from shampoo_jax.matrix.products import contract
from shampoo_jax.parts.factors import accumulate_factors, damp, normalize_by_trace

GRADIENTS = np.random.default_rng(0).normal(size=(4, 2, 3, 4)).astype(np.float32)


def blocks_of(g, exponents=None):
    blocks = Blocks.of(jnp.asarray(g), exponents)
    return {"k": dataclasses.replace(blocks, update=jnp.zeros_like(blocks.update))}


def run(tx, gradients=GRADIENTS):
    """Matrices reported after each step, and the final state."""

    def step(state, g):
        new, state = tx.update(blocks_of(g), state)
        return state, new["k"].matrices

    scan = jax.jit(lambda gs: jax.lax.scan(step, tx.init(blocks_of(gs[0])), gs))
    state, matrices = scan(jnp.asarray(gradients))
    return matrices, state


def grams(g):
    """The factor of each dimension of one block, in float64."""
    g = g.astype(np.float64)
    rows = [np.moveaxis(g, k, 0).reshape(g.shape[k], -1) for k in range(g.ndim)]
    return [r @ r.T for r in rows]


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (2, 1, 3, 2), (1, 1)])
def test_contraction_over_all_other_dimensions(shape):
    x = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
    for k in range(len(shape)):
        expected = np.stack([grams(block)[k] for block in x])
        np.testing.assert_allclose(contract(jnp.asarray(x), k), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("b2", "weighted", "correct"),
    [
        (0.9, True, True),
        (0.9, True, False),
        (0.9, False, True),  # unweighted sums are not corrected
        (1.0, True, True),  # a plain sum
        (1.0, False, False),
        (0.0, True, True),
    ],
)
def test_decay_and_correction(b2, weighted, correct):
    tx = accumulate_factors(b2, weighted=weighted, bias_correction=correct)
    matrices, state = run(tx)
    weight = 1 - b2 if weighted and b2 < 1 else 1.0
    sums = [[np.zeros((3, 3)), np.zeros((4, 4))] for _ in range(2)]
    for t, gradient in enumerate(GRADIENTS, start=1):
        scale = 1 - b2**t if correct and weighted and b2 < 1 else 1.0
        for n, block in enumerate(gradient):
            for k, gram in enumerate(grams(block)):
                sums[n][k] = b2 * sums[n][k] + weight * gram
                np.testing.assert_allclose(
                    matrices[k][t - 1, n], sums[n][k] / scale, rtol=1e-4, atol=1e-5
                )
    assert int(state.count) == len(GRADIENTS)


def test_a_traced_b2_of_one_sums():
    traced = jax.jit(lambda b2: run(accumulate_factors(b2))[0])(1.0)
    for x, y in zip(traced, run(accumulate_factors(1.0))[0], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_dimensions_with_exponent_zero_have_no_factor():
    tx, blocks = accumulate_factors(0.9), blocks_of(GRADIENTS[0], (0.25, 0.0))
    state = tx.init(blocks)
    assert state.factors["k"][0].shape == (2, 3, 3)
    assert state.factors["k"][1] is None
    new, _ = tx.update(blocks, state)
    assert new["k"].matrices[1] is None


def test_statistics_read_the_gradient_and_leave_the_update():
    new, _ = accumulate_factors().update(
        blocks_of(GRADIENTS[0]), accumulate_factors().init(blocks_of(GRADIENTS[0]))
    )
    np.testing.assert_array_equal(new["k"].update, np.zeros_like(GRADIENTS[0]))
    np.testing.assert_array_equal(new["k"].gradient, GRADIENTS[0])


def factors_only(*factors):
    return {"k": dataclasses.replace(Blocks.of(jnp.zeros((1, 2, 2))), matrices=factors)}


def test_damp_and_trace_scaling():
    a = jnp.asarray([[[3.0, 1.0], [1.0, 1.0]]])
    new, _ = damp(0.5).update(factors_only(a, None), ())
    np.testing.assert_array_equal(new["k"].matrices[0], [[[3.5, 1.0], [1.0, 1.5]]])
    assert new["k"].matrices[1] is None
    new, _ = normalize_by_trace(0.5).update(factors_only(a, None), ())
    np.testing.assert_allclose(new["k"].matrices[0], a / 2, rtol=1e-6)
    new, _ = normalize_by_trace(1.0, floor=8.0).update(factors_only(a), ())
    np.testing.assert_allclose(new["k"].matrices[0], a / 8, rtol=1e-6)
    new, _ = normalize_by_trace(0.5).update(factors_only(0 * a), ())
    np.testing.assert_array_equal(new["k"].matrices[0], 0 * a)
