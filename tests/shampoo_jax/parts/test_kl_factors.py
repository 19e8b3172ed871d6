"""Factors whitened by roots that are zero, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from shampoo_jax import scale_by_shampoo


def truncated_root(a):
    values, q = np.linalg.eigh(a)
    powers = np.where(values > 1e-6 * values.max(), np.abs(values) + (values == 0), np.inf) ** -0.25
    return q @ np.diag(powers) @ q.T


def test_a_zero_root_whitens_like_the_identity():
    """One of two blocks of a stack begins with a zero gradient: its first factors are plain."""
    b2 = 0.9
    g, other = np.random.default_rng(0).normal(size=(2, 3, 2)).astype(np.float32)
    tx = scale_by_shampoo(0.0, b2, statistics="kl", graft=None)
    first = {"late": jnp.zeros((3, 2)), "early": jnp.asarray(other)}
    _, state = tx.update(first, tx.init(first))
    updates, state = jax.jit(tx.update)({"late": jnp.asarray(g), "early": first["early"]}, state)
    weight = (1 - b2) / (1 - b2**2)
    expected = truncated_root(weight * g @ g.T) @ g @ truncated_root(weight * g.T @ g)
    np.testing.assert_allclose(updates["late"], expected, rtol=1e-3, atol=1e-4)
    # The other block was whitened by its root of the first step.
    root_l, root_r = truncated_root(other @ other.T), truncated_root(other.T @ other)
    left, right = (
        b2 * a @ a.T + b @ b.T for a, b in ((other, other @ root_r), (other.T, other.T @ root_l))
    )
    scale = ((1 - b2) / (1 - b2**2)) ** -0.5
    expected = scale * truncated_root(left) @ other @ truncated_root(right)
    np.testing.assert_allclose(updates["early"], expected, rtol=1e-3, atol=1e-4)
