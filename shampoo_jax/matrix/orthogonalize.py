"""Orthogonalized updates, the spectral descent family: Newton-Schulz iteration and SVD."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from shampoo_jax.base.options import (
    WholeNumber,
    check_choice,
    check_entries,
    check_options,
    refuse,
)
from shampoo_jax.matrix.batching import map_matrices
from shampoo_jax.matrix.eigh import power_of_two_scale
from shampoo_jax.matrix.products import matmul

# Muon's quintic: fast growth of small singular values rather than convergence to one.
QUINTIC = (3.4445, -4.775, 2.0315)


def check_coefficients(coefficients: Any, steps: int | None = None) -> None:
    """Raises ValueError for what are not three numbers, or where there are steps three for each."""
    if np.shape(coefficients) not in ((3,), (steps, 3)):
        each = "" if steps is None else f", or {steps} times three, one for each step"
        refuse("coefficients", coefficients, f": give three numbers, such as {QUINTIC}{each}")


def newton_schulz(
    update: jax.Array,
    steps: int = 5,
    coefficients: Sequence[float] | Sequence[Sequence[float]] = QUINTIC,
    eps: ArrayLike = 1e-15,
    *,
    norm: str = "frobenius",
    shift: ArrayLike = 0.0,
) -> jax.Array:
    """Returns an approximation of the polar factor U V^T of U S V^T by odd polynomials.

    `X = F / (max(|F|, eps) + shift)`, then `steps` times `X <- a X + (b B + c B^2) X` with
    `B = X X^T`, on the side that makes B small. Singular values end near 1; not within rounding for
    the default coefficients, whose fixed point is not attracting.

    Args:
      update: f[..., m, n].
      steps: Static number of iterations.
      coefficients: Static (a, b, c), or as many of these as there are steps.
      eps: Floor of the norm, in the units of the update.
      norm: `"frobenius"`, or `"schatten4"`, the fourth root of the sum of the singular values'
        fourth powers: no less than the largest of them either, and closer to it.
      shift: Added to the norm, in the units of the update.

    Returns:
      f[..., m, n], dtype of the update; zero for the zero matrix.

    Source: Jordan et al., Muon, 2024; Bernstein and Newhouse, arXiv:2409.20325.

    >>> newton_schulz(3 * jnp.eye(2), steps=12, coefficients=(1.5, -0.5, 0.0)).round(3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    WholeNumber("5 are Muon's", least=0)("steps", steps)
    check_entries({"eps": eps})
    check_choice("norm", norm, tuple(NORMS))
    check_coefficients(coefficients, steps)
    triples: Any = [coefficients] * steps if np.ndim(coefficients) == 1 else coefficients
    rounded, product = _arithmetic(update.dtype)
    wide = update.shape[-2] <= update.shape[-1]
    x = rounded(update if wide else jnp.matrix_transpose(update))
    length = rounded(jnp.maximum(NORMS[norm](x)[..., None, None], eps))
    x = rounded(x / rounded(length + shift))
    for a, b, c in triples:
        gram = product(x, jnp.matrix_transpose(x))
        inner = rounded(rounded(b * gram) + product(rounded(c * gram), gram))
        x = rounded(rounded(a * x) + product(inner, x))
    x = x.astype(update.dtype)
    return x if wide else jnp.matrix_transpose(x)


def _arithmetic(dtype: Any) -> tuple[Callable[[jax.Array], jax.Array], Callable[..., jax.Array]]:
    """Rounding and products in a precision; below float32 as Muon's script has them.

    There each product and sum is rounded once and coefficients are not. A Python number times a
    bfloat16 array would be rounded before, and a compiler may leave out roundings between
    operations that it fuses, which changes updates by half a percent. Rounded products are not
    symmetric any more, so sides and order are the script's, too.
    """
    if jnp.finfo(dtype).bits >= 32:
        return lambda x: x, matmul
    info = jnp.finfo(dtype)

    def rounded(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(x.astype(jnp.float32), info.nexp, info.nmant)

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return rounded(matmul(x.astype(dtype), y.astype(dtype)))

    return rounded, product


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


def frobenius_norm(matrix: jax.Array) -> jax.Array:
    """`|F|_F` of each matrix f[..., m, n], without overflow or underflow of the squares.

    >>> float(frobenius_norm(jnp.diag(jnp.array([3e30, 4e30]))) / 1e30)
    5.0
    """
    scale = power_of_two_scale(matrix)
    return scale[..., 0, 0] * jnp.linalg.norm(matrix / scale, axis=(-2, -1))


def schatten4_norm(matrix: jax.Array) -> jax.Array:
    """Fourth root of the sum of the singular values' fourth powers of each matrix f[..., m, n].

    It is the root of the Frobenius norm of the Gram matrix, taken without overflow or underflow.

    >>> float(schatten4_norm(1e30 * jnp.eye(16)) / 1e30)
    2.0
    """
    scale = power_of_two_scale(matrix)
    x = matrix / scale
    x = x if x.shape[-2] >= x.shape[-1] else jnp.matrix_transpose(x)
    gram = matmul(jnp.matrix_transpose(x), x)
    return scale[..., 0, 0] * jnp.sqrt(jnp.linalg.norm(gram, axis=(-2, -1)))


NORMS = {"frobenius": frobenius_norm, "schatten4": schatten4_norm}
