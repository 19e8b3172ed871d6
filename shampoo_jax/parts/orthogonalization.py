"""Orthogonalized updates as a part: Muon's last step behind any direction, at the owners."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from shampoo_jax.base.options import check_choice, check_dtype, check_options
from shampoo_jax.blocks.blocks import Array, Blocks, Part, stateless
from shampoo_jax.matrix.orthogonalize import (
    QUINTIC,
    check_coefficients,
    newton_schulz,
    svd_orthogonalize,
)


def orthogonalize(
    method: Literal["newton_schulz", "polar"] = "newton_schulz",
    *,
    steps: int = 5,
    coefficients: Sequence[float] | Sequence[Sequence[float]] = QUINTIC,
    dtype: Any = None,
    norm: Literal["frobenius", "schatten4"] = "frobenius",
    eps: Any = 0.0,
) -> Part:
    """Replaces the update `U S V^T` of each block by its polar factor `U V^T`.

    A block of more than two dimensions counts as the matrix of its first dimension and the rest, a
    vector as a matrix of one column. Zero stays zero, and the length of an update does not matter.
    What is orthogonalized are blocks: take `Blocking(size=None)` for whole matrices, as Muon does.

    Args:
      method: `"newton_schulz"`, products alone, singular values near 1; or `"polar"`, an SVD.
      steps: Of the Newton-Schulz iteration.
      coefficients: (a, b, c) of its odd polynomial, or one triple a step; Muon's by default.
      dtype: Of the iteration's arithmetic; `jnp.bfloat16` is Muon's. None means that of the blocks,
        in which the SVD is taken in any case.
      norm: What the iteration divides an update by first, see `matrix.newton_schulz`.
      eps: Added to that norm, on the scale of updates; 0 makes no difference between large and
        small ones, as the benchmark's 1e-7 does.

    Returns:
      A stateless part. Behind a finished direction it goes by `followed_by`.

    Raises:
      ValueError: Another method, steps below 1, coefficients that are not three, or another dtype.

    Sources: Jordan et al., Muon, 2024; `matrix.newton_schulz`, `matrix.svd_orthogonalize`.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> tx = shampoo_jax.blocked(orthogonalize("polar"))
      >>> grads = {"w": jnp.array([[0.0, 3.0], [-2.0, 0.0]])}
      >>> tx.update(grads, tx.init(grads))[0]["w"].round(3).tolist()
      [[0.0, 1.0], [-1.0, 0.0]]
    """
    check_choice("method", method, ("newton_schulz", "polar"))
    check_options({"steps": steps, "eps": eps})
    check_choice("norm", norm, ("frobenius", "schatten4"))
    check_dtype("dtype", dtype)
    check_coefficients(coefficients, steps)

    def polar(x: Array) -> Array:
        if method == "polar":
            return svd_orthogonalize(x)
        x = x.astype(dtype or x.dtype)
        return newton_schulz(x, steps, coefficients, norm=norm, shift=eps)

    def update(b: Blocks) -> Blocks:
        columns = b.update.reshape(*b.update.shape[:2], -1) if b.ndim else b.update[:, None, None]
        x = polar(columns).astype(b.update.dtype).reshape(b.update.shape)
        return dataclasses.replace(b, update=x)

    return stateless(update)
