"""Orthogonalized updates, the spectral descent family: Newton-Schulz iteration and SVD."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from shampoo_jax.base.options import WholeNumber, check_entries, check_options, refuse
from shampoo_jax.matrix.batching import map_matrices
from shampoo_jax.matrix.eigh import power_of_two_scale
from shampoo_jax.matrix.products import matmul

# Muon's quintic: fast growth of small singular values rather than convergence to one.
QUINTIC = (3.4445, -4.775, 2.0315)


def check_coefficients(coefficients: Sequence[float]) -> None:
    """Raises ValueError for what are not three numbers."""
    if np.shape(coefficients) != (3,):
        refuse("coefficients", coefficients, f": give three numbers, such as {QUINTIC}")


def newton_schulz(
    update: jax.Array,
    steps: int = 5,
    coefficients: Sequence[float] = QUINTIC,
    eps: ArrayLike = 1e-15,
) -> jax.Array:
    """Returns an approximation of the polar factor U V^T of U S V^T by odd polynomials.

    `X = F / max(|F|_F, eps)`, then `steps` times `X <- a X + X (b B + c B^2)` with `B = X^T X`,
    on the side that makes B small. Singular values end near 1; not within rounding for the
    default coefficients, whose fixed point is not attracting.

    Args:
      update: f[..., m, n].
      steps: Static number of iterations.
      coefficients: Static (a, b, c).
      eps: Floor of the norm, in the units of the update.

    Returns:
      f[..., m, n], dtype of the update; zero for the zero matrix.

    Source: Jordan et al., Muon, 2024; Bernstein and Newhouse, arXiv:2409.20325.

    >>> newton_schulz(3 * jnp.eye(2), steps=12, coefficients=(1.5, -0.5, 0.0)).round(3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    WholeNumber("5 are Muon's", least=0)("steps", steps)
    check_entries({"eps": eps})
    check_coefficients(coefficients)
    a, b, c = coefficients
    tall = update.shape[-2] >= update.shape[-1]
    x = update if tall else jnp.matrix_transpose(update)
    x = _normalized(x, eps)
    for _ in range(steps):
        gram = matmul(jnp.matrix_transpose(x), x)
        x = a * x + matmul(x, b * gram + c * matmul(gram, gram))
    return x if tall else jnp.matrix_transpose(x)


def svd_orthogonalize(update: jax.Array, *, scale_by_nuclear_norm: bool = False) -> jax.Array:
    """Returns the polar factor U V^T of U S V^T, or tr(S) U V^T: the steepest descent step.

    Directions with a singular value of exactly zero are left out, so the zero matrix stays zero.

    Args:
      update: f[..., m, n].
      scale_by_nuclear_norm: Static. Multiplies by the sum of singular values.

    Returns:
      f[..., m, n], dtype of the update.

    Source: Carlson et al., Stochastic spectral descent, AISTATS 2015.

    >>> abs(svd_orthogonalize(jnp.diag(jnp.array([3.0, -2.0])))).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    check_options({"scale_by_nuclear_norm": scale_by_nuclear_norm})
    svd = functools.partial(jnp.linalg.svd, full_matrices=False)
    u, s, vt = map_matrices(svd, update.shape[:-2], update)
    polar = matmul(u * (s > 0)[..., None, :], vt)
    return polar * jnp.sum(s, axis=-1)[..., None, None] if scale_by_nuclear_norm else polar


def _normalized(matrix, eps):
    """Divides by the Frobenius norm, taken without overflow or underflow of the squares."""
    scale = power_of_two_scale(matrix)
    norm = scale * jnp.linalg.norm(matrix / scale, axis=(-2, -1), keepdims=True)
    return matrix / jnp.maximum(norm, eps)
