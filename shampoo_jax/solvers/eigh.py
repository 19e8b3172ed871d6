"""Solvers by symmetric eigendecomposition: the options of `matrix.eigh`, kept as objects."""

import dataclasses
from typing import Any

import jax

from shampoo_jax.base.options import Checked
from shampoo_jax.matrix import eigh
from shampoo_jax.solvers.solver import EIGH, PRODUCT, Cost, Solver

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TruncatedEigh(Checked, Solver):
    """Eigendecomposition with a pseudo-inverse cutoff, see `matrix.eigh.truncated_root`.

    Attributes:
      rtol: Cutoff relative to the largest eigenvalue; None means `d * eps` of the dtype, 0 keeps
        every eigenvalue above 0, rounding noise included, as track-3 result 35 does.
      atol: Absolute cutoff; depends on the scale of the gradients.
      implementation: `"qr"`, `"jacobi"`, `"qdwh"` or None, see `matrix.eigh.eigh`.

    Example:
      >>> import jax.numpy as jnp
      >>> factor = jnp.diag(jnp.array([16.0, 1e-7]))[None]
      >>> root, ok, _ = TruncatedEigh()(factor, 0.25, ())
      >>> root.round(4).tolist(), ok.tolist()
      ([[[0.5, 0.0], [0.0, 0.0]]], [True])
    """

    rtol: Any = None
    atol: Any = 0.0
    implementation: str | None = None

    def cost(self, d: int, dtype: Any, exponent: float) -> Cost:
        """A decomposition and a product."""
        return Cost(EIGH + PRODUCT, "eigh")

    def __call__(self, factor: Array, exponent: float, state: Any) -> tuple[Array, Array, Any]:
        """See `Solver`."""
        return *eigh.truncated_root(factor, exponent, **vars(self)), state


@dataclasses.dataclass(frozen=True)
class ShiftedEigh(Checked, Solver):
    """Eigendecomposition of `A + damping I`, see `matrix.eigh.shifted_root`.

    Attributes:
      damping: Added to every eigenvalue; absolute, so it depends on the scale of the gradients.
        With 0 nothing is damped: a singular factor has no root and keeps the old one.
      before: Whether it is added before the decomposition.
      implementation: As in `TruncatedEigh`.

    Example:
      >>> import jax.numpy as jnp
      >>> root, ok, _ = ShiftedEigh(damping=1.0)(jnp.diag(jnp.array([15.0, 0.0]))[None], 0.25, ())
      >>> root.round(4).tolist(), ok.tolist()
      ([[[0.5, 0.0], [0.0, 1.0]]], [True])
    """

    damping: Any = 1e-12
    before: bool = True
    implementation: str | None = None

    def cost(self, d: int, dtype: Any, exponent: float) -> Cost:
        """A decomposition and a product."""
        return Cost(EIGH + PRODUCT, "eigh")

    def __call__(self, factor: Array, exponent: float, state: Any) -> tuple[Array, Array, Any]:
        """See `Solver`."""
        return *eigh.shifted_root(factor, exponent, **vars(self)), state
