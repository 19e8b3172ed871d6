"""The first moment against its formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_jax.parts.filtering import filter_gradient, power


def run(tx, gradients):
    """Updates of a plain array over several steps."""

    def step(state, g):
        update, state = tx.update(g, state)
        return state, update

    return jax.jit(lambda gs: jax.lax.scan(step, tx.init(gs[0]), gs))(jnp.asarray(gradients))


GRADIENTS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("b1", "b3", "correct"),
    [
        (0.9, None, True),
        (0.9, None, False),
        (0.9, 0.81, True),
        (0.9, 0.99, False),
        (0.5, 0.0, True),
        (0.0, None, True),
    ],
)
def test_updates(b1, b3, correct):
    state, updates = run(filter_gradient(b1, b3, bias_correction=correct), GRADIENTS)
    mu, out = np.zeros(3), b1 if b3 is None else b3
    for t, g in enumerate(GRADIENTS, start=1):
        expected = out * mu + (1 - out) * g
        if correct:
            expected /= 1 - out * b1 ** (t - 1)
        mu = b1 * mu + (1 - b1) * g
        np.testing.assert_allclose(updates[t - 1], expected, rtol=2e-5, atol=1e-6)
    assert int(state.count) == len(GRADIENTS)


def test_a_constant_gradient_passes_unchanged():
    for b3 in (None, 0.3):
        _, updates = run(filter_gradient(0.95, b3), np.full((5, 2), 3.0, np.float32))
        np.testing.assert_allclose(updates, 3.0, rtol=1e-5)


def test_the_average_can_be_stored_in_bfloat16():
    state, updates = run(filter_gradient(0.9, mu_dtype=jnp.bfloat16), GRADIENTS)
    exact_state, exact = run(filter_gradient(0.9), GRADIENTS)
    assert (state.mu[""].dtype, updates.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(updates, exact, atol=2**-7)
    np.testing.assert_allclose(state.mu[""].astype(np.float32), exact_state.mu[""], atol=2**-8)
    with pytest.raises(ValueError, match="mu_dtype=int8: use bfloat16 or float32"):
        filter_gradient(mu_dtype=jnp.int8)


def test_decays_may_be_traced():
    def first_two(b1, b3):
        return run(filter_gradient(b1, b3), GRADIENTS[:2])[1]

    traced = jax.jit(first_two)(0.9, 0.8)
    np.testing.assert_allclose(traced, first_two(0.9, 0.8), rtol=1e-6)


def test_half_precision_gradients_are_averaged_in_float32():
    g = jnp.asarray(GRADIENTS, jnp.bfloat16)
    state, updates = run(filter_gradient(0.9), g)
    assert updates.dtype == jnp.bfloat16
    assert jax.tree.leaves(state.mu)[0].dtype == jnp.float32


def test_power_at_zero():
    counts = jnp.arange(3)
    np.testing.assert_array_equal(jax.vmap(lambda t: power(0.0, t, jnp.float32))(counts), [1, 0, 0])
    np.testing.assert_allclose(
        jax.vmap(lambda t: power(0.5, t, jnp.float32))(counts), [1, 0.5, 0.25]
    )
