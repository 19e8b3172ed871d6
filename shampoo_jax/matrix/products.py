"""Products of stacked arrays: at the full accuracy of their dtype, or as fast as was found safe.

What statistics and their application may lose is measured by `scripts.maintenance.precision_table`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# The default precision of a float32 product is TF32 on recent GPUs and bfloat16 on TPUs: an
# iteration that amplifies its smallest eigenvalues then leaves the range where it converges.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
# Values of `jax.default_matmul_precision` that keep all products of float32 in float32.
FULL = ("float32", "highest")


def all_full(dtype: Any) -> bool:
    """Whether the user wants no faster products than of the dtype itself, or there are none."""
    config: Any = jax.config  # has its options as attributes
    return jnp.dtype(dtype) != jnp.float32 or config.jax_default_matmul_precision in FULL


def gram(x: jax.Array) -> jax.Array:
    """`X X^T` of a stack `[N, d, n]` in the dtype of X.

    >>> gram(jnp.array([[[3.0], [4.0]]])).tolist()
    [[[9.0, 12.0], [12.0, 16.0]]]
    """
    return matmul(x, x.swapaxes(1, 2))


def swift_gram(x: jax.Array) -> jax.Array:
    """`X X^T` by two bfloat16 products on GPUs and TPUs, summed in float32; as `gram` elsewhere.

    With `X = H + R`, heads and rests in bfloat16, it is `H H^T + H R^T + R H^T`, of which the last
    is the one before, transposed. What is left out is 2^-16 of the largest eigenvalue at most.

    Args:
      x: `[N, d, n]`. Other dtypes than float32, and all under `jax.default_matmul_precision` of
        "highest", are multiplied in full.

    Returns:
      `[N, d, d]`, symmetric.

    >>> swift_gram(jnp.array([[[3.0], [4.0]]])).tolist()
    [[[9.0, 12.0], [12.0, 16.0]]]
    """
    if all_full(x.dtype):
        return gram(x)
    return jax.lax.platform_dependent(x, cpu=gram, default=_gram_of_halves)


def _gram_of_halves(x: jax.Array) -> jax.Array:
    heads, rests = _halves(x)
    once, twice = (_of_halves(heads, y.swapaxes(1, 2)) for y in (heads, rests))
    return once + (twice + twice.swapaxes(1, 2))


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # A pair of casts may be taken for nothing by a compiler; this rounding is not.
    head = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return head.astype(jnp.bfloat16), (x - head).astype(jnp.bfloat16)


_of_halves = functools.partial(
    jnp.matmul, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32
)


def by_three(a: jax.Array, b: jax.Array) -> jax.Array:
    """`A B` of float32 by three products of bfloat16 numbers, all but the one of both rests.

    >>> by_three(jnp.array([[1.0 + 2.0**-9]]), jnp.array([[2.0]])).item() == 2 + 2.0**-8
    True
    """
    (a, a_rest), (b, b_rest) = map(_halves, (a, b))
    return _of_halves(a, b) + (_of_halves(a, b_rest) + _of_halves(a_rest, b))


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


def contract(x: jax.Array, dim: int, gram: Callable[[jax.Array], jax.Array] = gram) -> jax.Array:
    """`X_(k) X_(k)^T` of each block: contraction of a stack with itself over all but one dimension.

    Args:
      x: Stack `[N, *block]`.
      dim: Dimension of the block, counted without the stack axis.
      gram: Of matrices `[N, d, n]`.

    Returns:
      `[N, d, d]` in the dtype of `x`.

    >>> contract(jnp.array([[[3.0, 0.0], [4.0, 0.0]]]), 1).tolist()
    [[[25.0, 0.0], [0.0, 0.0]]]
    """
    rows = jnp.moveaxis(x, dim + 1, 1)
    return gram(rows.reshape(*rows.shape[:2], -1))


def apply_matrices(
    x: jax.Array,
    matrices: Sequence[jax.Array | None],
    *,
    transpose: bool = False,
    swift: bool = False,
) -> jax.Array:
    """Multiplies each dimension k of a stack by its matrix: `x x_1 P_1 x_2 P_2 ...`.

    Args:
      x: Stack `[N, *block]`.
      matrices: `[N, d, d]` or None (identity) per dimension; empty for all identities.
      transpose: Whether to multiply by the transposes, as in a change into an eigenbasis.
      swift: Whether float32 products may be TF32 on GPUs that have it, three of bfloat16 on TPUs,
        unless `jax.default_matmul_precision` is "highest".

    Returns:
      `[N, *block]`.

    >>> apply_matrices(jnp.ones((1, 2)), [jnp.diag(jnp.array([2.0, 3.0]))[None]]).tolist()
    [[2.0, 3.0]]
    """
    fast = swift and not all_full(x.dtype)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGH) if fast else matmul
    for k, matrix in enumerate(matrices):
        if matrix is None:
            continue
        rows = jnp.moveaxis(x, k + 1, 1)
        flat = rows.reshape(*rows.shape[:2], -1)
        left = matrix.swapaxes(1, 2) if transpose else matrix
        x = jnp.moveaxis(product(left, flat).reshape(rows.shape), 1, k + 1)
    return x
