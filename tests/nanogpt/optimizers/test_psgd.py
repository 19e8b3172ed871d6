"""The port of PSGD-Kron: one step against numpy, and what it is to converge to."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt.optimizers.psgd import scale_by_psgd

RNG = np.random.default_rng(0)


def numpy_step(m, left, right, probe, rate):
    """Both factors after one step of the fit, in float64."""
    a = left @ m @ right.T
    b = np.linalg.inv(left).T @ probe @ np.linalg.inv(right)

    def step(q, ours, probes):
        total = ours + probes
        column = total[:, np.argmax(np.linalg.norm(total, axis=0))]
        curvature = np.linalg.norm(total @ column) / np.linalg.norm(column)
        return q - rate / curvature * np.triu(ours - probes) @ q

    left, right = step(left, a @ a.T, b @ b.T), step(right, a.T @ a, b.T @ b)
    ratio = np.sqrt(np.abs(right).max() / np.abs(left).max())
    return left * ratio, right / ratio


def test_three_steps_equal_numpy():
    b1, rate, seed = 0.8, 0.5, 3
    tx = scale_by_psgd(b1, rate, seed)
    step = jax.jit(tx.update)
    gradients = [jnp.float32(50 * RNG.normal(size=(4, 6))) for _ in range(3)]
    state, mu, left, right = tx.init(gradients[0]), np.zeros((4, 6)), None, None
    for t, g in enumerate(gradients, 1):
        update, state = step(g, state)
        mu = b1 * mu + (1 - b1) * np.float64(g)
        m = mu / (1 - b1**t)
        if left is None:
            scale = np.mean(m**4) ** (-1 / 16)
            left, right = scale * np.eye(4), scale * np.eye(6)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), t), 0)
        probe = np.float64(jax.random.rademacher(key, (4, 6), jnp.float32))
        left, right = numpy_step(m, left, right, probe, rate)
        np.testing.assert_allclose(state.left, left, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.right, right, rtol=1e-4, atol=1e-6)
        expected = left.T @ left @ m @ right.T @ right
        np.testing.assert_allclose(update, expected, rtol=1e-3, atol=1e-3)


def test_gradients_of_any_covariance_are_whitened():
    """Fitted for 600 steps, updates have about unit covariance, whatever the gradients have."""
    m, n = 4, 6
    mix_l, mix_r = np.diag(3.0 ** np.arange(m)), RNG.normal(size=(n, n))
    noise = RNG.normal(size=(900, m, n))
    gradients = jnp.float32(mix_l @ noise @ mix_r)
    tx = scale_by_psgd(b1=0.0, rate=0.1)

    def step(state, g):
        update, state = tx.update(g, state)
        return state, update

    _, updates = jax.jit(lambda gs: jax.lax.scan(step, tx.init(gs[0]), gs))(gradients)
    spread = np.linalg.eigvalsh(np.cov(np.asarray(updates[600:]).reshape(300, -1).T))
    assert 0.1 < spread.min() and spread.max() < 4.0


def test_zero_gradients_give_zero_and_leave_the_start_open():
    tx, zero, g = scale_by_psgd(), jnp.zeros((2, 3)), jnp.ones((2, 3))
    step = jax.jit(tx.update)
    update, state = step(zero, tx.init(zero))
    np.testing.assert_array_equal(update, zero)
    update, state = step(g, state)
    assert jnp.isfinite(update).all() and jnp.abs(update).max() > 0
    before = state
    _, state = step(g, state)
    assert (state.left != before.left).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_state_keeps_its_precision_where_float64_is_enabled(dtype):
    with jax.enable_x64(True):
        tx, w = scale_by_psgd(), jax.ShapeDtypeStruct((3, 2), dtype)
        state = jax.eval_shape(tx.init, w)
        updates, after = jax.eval_shape(tx.update, w, state)
    assert updates == w and after == state
    assert state.left.dtype == dtype


def test_only_matrices():
    with pytest.raises(ValueError, match=r"shape=\(3,\): PSGD-Kron takes matrices"):
        scale_by_psgd().init(jnp.ones(3))


HANG = """
import jax, jax.numpy as jnp
from nanogpt.optimizers.psgd import scale_by_psgd

shapes = [(64, 64), (64, 256), (256, 64)]
params = {f"{s}{i}": jax.random.normal(jax.random.key(i), s) for s in shapes for i in range(4)}
tx = scale_by_psgd()
state, step = jax.jit(tx.init)(params), jax.jit(tx.update)
for _ in range(15):
    updates, state = jax.block_until_ready(step(params, state))
"""


def test_stacks_of_several_shapes_do_not_wait_for_each_other():
    # In batches they did, at about every second start, with XLA's own number of threads.
    cleared = ("NPROC", "XLA_FLAGS")
    environment = {k: v for k, v in os.environ.items() if k not in cleared}
    subprocess.run([sys.executable, "-c", HANG], env=environment, timeout=120, check=True)
