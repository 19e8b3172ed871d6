"""The derivative of a function of a symmetric matrix, which no way of computing it has to provide.

Loops of unknown length have no reverse mode, and eigenvectors of equal eigenvalues no derivative,
but roots have one.
"""

import jax
import jax.numpy as jnp

from shampoo_jax.matrix.products import matmul

Array = jax.Array


def moved(values: Array, vectors: Array, powers: Array, slopes: Array, change: Array) -> Array:
    """The change of `f(A) = Q diag(powers) Q^T` along a change of `A = Q diag(values) Q^T`.

    `Q (F * (Q^T dA Q)) Q^T` with the divided differences `F_ij = (f(w_i) - f(w_j)) / (w_i - w_j)`,
    and `f'` where eigenvalues are equal or nearly so. Source: Daleckii and Krein 1965; Higham,
    Functions of Matrices, theorem 3.11.

    Args:
      values: Eigenvalues w, `[..., d]`.
      vectors: Eigenvectors Q in columns, `[..., d, d]`.
      powers: `f(w)`, `[..., d]`; where it is cut off, the cutoff does not move.
      slopes: `f'(w)`, `[..., d]`.
      change: Of A, `[..., d, d]`; its symmetric part counts.

    Returns:
      `[..., d, d]`, symmetric.

    >>> ones = jnp.ones(2)  # the square, whose change is dA A + A dA
    >>> moved(ones, jnp.eye(2), ones**2, 2 * ones, jnp.array([[3.0, 1.0], [1.0, 0.0]])).tolist()
    [[6.0, 2.0], [2.0, 0.0]]
    """
    rows, columns = values[..., :, None], values[..., None, :]
    gap, size = rows - columns, jnp.maximum(jnp.abs(rows), jnp.abs(columns))
    # In nearer ones rounding of the difference is more than what the mean slope leaves out.
    near = jnp.abs(gap) <= float(jnp.finfo(values.dtype).eps) ** (1 / 3) * size
    quotients = (powers[..., :, None] - powers[..., None, :]) / jnp.where(near, 1.0, gap)
    means = (slopes[..., :, None] + slopes[..., None, :]) / 2
    transposed = vectors.swapaxes(-1, -2)
    rotated = matmul(transposed, matmul((change + change.swapaxes(-1, -2)) / 2, vectors))
    return matmul(vectors, matmul(jnp.where(near, means, quotients) * rotated, transposed))
