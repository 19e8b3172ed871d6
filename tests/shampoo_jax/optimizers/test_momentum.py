"""Momentum against numpy and against Optax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shampoo_jax.optimizers.momentum import momentum

DIRECTIONS = np.random.default_rng(0).normal(size=(8, 3, 2))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dampening", [0.0, 0.3])
@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_formula_against_numpy(decay, dampening, nesterov):
    tx = momentum(decay, dampening, nesterov)
    state = tx.init(jnp.zeros((3, 2)))
    update = jax.jit(tx.update)
    m = np.zeros((3, 2))
    for d in DIRECTIONS:
        updates, state = update(jnp.asarray(d, jnp.float32), state)
        m = decay * m + (1 - dampening) * d
        expected = (1 - dampening) * d + decay * m if nesterov else m
        np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_dampening_it_is_optax_trace(nesterov):
    ours, optaxs = momentum(0.9, nesterov=nesterov), optax.trace(0.9, nesterov)
    params = jnp.zeros((3, 2))
    state, other = ours.init(params), optaxs.init(params)
    for d in jnp.asarray(DIRECTIONS, jnp.float32):
        updates, state = ours.update(d, state)
        expected, other = optaxs.update(d, other)
        np.testing.assert_array_equal(updates, expected)


def test_bfloat16_accumulates_in_float32():
    tx = momentum(0.99)
    step = jnp.full(4, 0.01, jnp.bfloat16)
    state = tx.init(step)
    for _ in range(100):
        updates, state = tx.update(step, state)
    assert updates.dtype == jnp.bfloat16
    expected = float(step[0]) * (1 - 0.99**100) / (1 - 0.99)
    np.testing.assert_allclose(np.asarray(updates, np.float64), expected, rtol=2.0**-8)


def test_injected_decay_and_dampening_follow_their_values():
    tx = optax.inject_hyperparams(momentum)(decay=0.5, dampening=0.0, nesterov=True)
    params = {"w": jnp.ones(2), "b": jnp.ones(3, jnp.bfloat16)}
    state = tx.init(params)
    update = jax.jit(tx.update, donate_argnums=1)
    _, state = update(params, state, params)
    state.hyperparams["decay"] = jnp.asarray(0.25)
    state.hyperparams["dampening"] = jnp.asarray(0.5)
    updates, state = update(params, state, params)  # M = .25 + .5, U = .5 + .25 * M
    np.testing.assert_allclose(updates["w"], 0.6875, rtol=1e-6)
    assert updates["b"].dtype == jnp.bfloat16
