"""Inverse powers of noisy numbers: the mean of a convex function is above that of the mean."""

import jax
import jax.numpy as jnp

from shampoo_jax.matrix.products import matmul

Array = jax.Array


def debiased(powers: Array, exponent: float, variance: Array) -> Array:
    """`max(w^-e - e (e + 1) / 2 * w^-(e + 2) * variance, 0)`, of `powers = w^-e`.

    `E[x^-e]` is about `w^-e` plus what is taken away here, for x of mean w and this variance. Where
    the power is 0, cut off, it stays 0. Source: arXiv:2605.20756, which has e = 1/4 and 1.

    Args:
      powers: `[..., d]`.
      exponent: e, positive.
      variance: Of w, `[..., d]`.

    Returns:
      `[..., d]`.

    >>> debiased(jnp.array([0.5, 0.5, 0.0]), 1.0, jnp.array([1.0, 9.0, 1.0])).tolist()
    [0.375, 0.0, 0.0]
    """
    share = exponent * (exponent + 1) / 2 * variance * powers ** (2 / exponent)
    return powers * jnp.maximum(1 - share, 0)


def variance_of_mean(samples: Array, axis: int) -> Array:
    """Variance of the mean of independent samples: the sum of squared deviations over `m (m - 1)`.

    >>> float(variance_of_mean(jnp.array([1.0, 3.0]), 0))
    1.0
    """
    return jnp.var(samples, axis, ddof=1) / samples.shape[axis]


def energy_variance(samples: Array, vectors: Array, unit: Array) -> Array:
    """Variance of `q^T (mean_j X_j X_j^T) q` for each eigenvector q.

    Args:
      samples: X, `[..., m, d, c]`, at least two of them.
      vectors: In columns, `[..., d, d]`.
      unit: That the energies are divided by first, `[..., 1, 1]`.

    Returns:
      `[..., d]`.
    """
    energies = matmul(vectors.swapaxes(-1, -2)[..., None, :, :], samples)
    return variance_of_mean(jnp.sum(energies * energies, -1) / unit, -2)
