"""Products of stacked arrays at the full accuracy of their dtype, on every backend."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

# The default precision of a float32 product is TF32 on recent GPUs and bfloat16 on TPUs: an
# iteration that amplifies its smallest eigenvalues then leaves the range where it converges.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def matrix_power(matrix: jax.Array, exponent: int) -> jax.Array:
    """Returns `matrix ** exponent` by repeated squaring.

    Args:
      matrix: f[..., n, n].
      exponent: Static integer >= 1.

    Returns:
      f[..., n, n], dtype of `matrix`.

    >>> int(matrix_power(2 * jnp.eye(3), 5)[0, 0])
    32
    """
    half, odd = divmod(exponent, 2)
    if half == 0:
        return matrix
    squared = matrix_power(matmul(matrix, matrix), half)
    return matmul(matrix, squared) if odd else squared


def repeat(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, times: int, loop: bool
) -> jax.Array:
    """`function(...function(x))`, spelt out or in a loop.

    >>> [repeat(lambda x: 2 * x, jnp.ones([]), 3, loop).item() for loop in (False, True)]
    [8.0, 8.0]
    """
    if loop:
        return jax.lax.fori_loop(0, times, lambda _, x: function(x), x)
    for _ in range(times):
        x = function(x)
    return x


def identity_like(x: jax.Array) -> jax.Array:
    """An identity matrix for each matrix of a stack, spelt out: ranks are promoted nowhere.

    >>> identity_like(jnp.ones((1, 2, 2))).tolist()
    [[[1.0, 0.0], [0.0, 1.0]]]
    """
    return jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)


def contract(x: jax.Array, dim: int) -> jax.Array:
    """`X_(k) X_(k)^T` of each block: contraction of a stack with itself over all but one dimension.

    Args:
      x: Stack `[N, *block]`.
      dim: Dimension of the block, counted without the stack axis.

    Returns:
      `[N, d, d]` in the dtype of `x`.

    >>> contract(jnp.array([[[3.0, 0.0], [4.0, 0.0]]]), 1).tolist()
    [[[25.0, 0.0], [0.0, 0.0]]]
    """
    rows = jnp.moveaxis(x, dim + 1, 1)
    rows = rows.reshape(*rows.shape[:2], -1)
    return matmul(rows, rows.swapaxes(1, 2))


def apply_matrices(
    x: jax.Array, matrices: Sequence[jax.Array | None], *, transpose: bool = False
) -> jax.Array:
    """Multiplies each dimension k of a stack by its matrix: `x x_1 P_1 x_2 P_2 ...`.

    Args:
      x: Stack `[N, *block]`.
      matrices: `[N, d, d]` or None (identity) per dimension; empty for all identities.
      transpose: Whether to multiply by the transposes, as in a change into an eigenbasis.

    Returns:
      `[N, *block]`.

    >>> apply_matrices(jnp.ones((1, 2)), [jnp.diag(jnp.array([2.0, 3.0]))[None]]).tolist()
    [[2.0, 3.0]]
    """
    for k, matrix in enumerate(matrices):
        if matrix is None:
            continue
        rows = jnp.moveaxis(x, k + 1, 1)
        flat = rows.reshape(*rows.shape[:2], -1)
        left = matrix.swapaxes(1, 2) if transpose else matrix
        x = jnp.moveaxis(matmul(left, flat).reshape(rows.shape), 1, k + 1)
    return x
