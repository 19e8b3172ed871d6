"""Norms of steps and of parameters, against numpy and as properties."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj
from tests.oracles import papers

RNG = np.random.default_rng(0)
W = {"a": RNG.normal(size=(6, 4)), "deep": {"b": 1e-3 * RNG.normal(size=(3, 5))}}
W = jax.tree.map(jnp.float32, W)
GRADIENTS = [jax.tree.map(lambda w: jnp.float32(RNG.normal(size=w.shape)), W) for _ in range(30)]


def test_hyperball_after_momentum_equals_numpy_for_thirty_scheduled_steps():
    schedule = optax.linear_schedule(0.3, 0.0, 40)
    tx = optax.chain(optax.trace(0.9), sj.hyperball(schedule))
    update, params, state = jax.jit(tx.update), W, tx.init(W)
    mine = jax.tree.map(np.float64, W)
    trace = jax.tree.map(np.zeros_like, mine)
    for s, g in enumerate(GRADIENTS):
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        trace = jax.tree.map(lambda t, g: 0.9 * t + np.float64(g), trace, g)
        rate = float(schedule(s))
        mine = jax.tree.map(lambda w, t, rate=rate: papers.hyperball(w, t, rate), mine, trace)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(b).max()),
            params,
            mine,
        )


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_hyperball_keeps_norms_and_does_not_see_the_scale_of_updates(scale):
    tx = sj.hyperball(0.1)
    params, angles = W, []
    for g in GRADIENTS:
        g = jax.tree.map(lambda x: x * scale, g)
        updates, _ = tx.update(g, tx.init(W), params)
        new = optax.apply_updates(params, updates)
        cosine = jnp.vdot(new["a"], params["a"]) / jnp.vdot(params["a"], params["a"])
        angles.append(float(jnp.arccos(cosine)))
        params = new
    for before, after in zip(jax.tree.leaves(W), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(
            jnp.linalg.norm(after), jnp.linalg.norm(before), rtol=1e-5, atol=0
        )
    assert max(angles) < 0.11  # the tangent of a step is at most the rate over 1 - rate


def test_what_is_zero_stays_zero():
    """No division by 0: a zero matrix on the ball, a zero update, a step onto the origin."""
    zero = jnp.zeros((2, 2))
    for tx in (sj.hyperball(0.1), sj.scale_to_norm(lambda w: 3.0)):
        updates, _ = tx.update(zero, tx.init(zero), jnp.eye(2))
        np.testing.assert_array_equal(updates, zero)
    ball, keep = sj.hyperball(0.1), sj.keep_norm()
    updates, _ = ball.update(jnp.eye(2), ball.init(zero), zero)
    np.testing.assert_array_equal(updates, zero)
    updates, _ = keep.update(-jnp.eye(2), keep.init(zero), jnp.eye(2))
    assert jnp.isfinite(updates).all()


def test_scale_to_norm_fixes_each_update_apart():
    tx = sj.scale_to_norm(lambda w: w.shape[1] ** 0.5)
    updates, _ = tx.update(GRADIENTS[0], tx.init(W), W)
    for update, g in zip(jax.tree.leaves(updates), jax.tree.leaves(GRADIENTS[0]), strict=True):
        expected = np.asarray(g) / np.linalg.norm(g) * g.shape[1] ** 0.5
        np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_norms_are_not_rounded_to_bfloat16():
    """A norm of 64.125 would be 64; roundings of single entries average out."""
    drawn = RNG.normal(size=(64, 64))
    update = jnp.asarray(drawn / np.linalg.norm(drawn) * 64.125, jnp.bfloat16)
    tx = sj.scale_to_norm(lambda w: 100.0)
    scaled, _ = tx.update(update, tx.init(update), update)
    assert scaled.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.linalg.norm(np.float64(scaled)), 100.0, rtol=5e-4)


def test_parameters_are_asked_for():
    with pytest.raises(ValueError, match="params=None"):
        sj.keep_norm().update(W, optax.EmptyState())
