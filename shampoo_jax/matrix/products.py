"""Products of stacked matrices at the full accuracy of their dtype, on every backend."""

import functools

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
