"""Solvers by coupled Newton iterations: the options of `matrix.newton`, kept as objects."""

import dataclasses
from typing import Any

import jax

from shampoo_jax.base.options import Checked
from shampoo_jax.matrix import newton
from shampoo_jax.solvers.solver import PRODUCT, Cost, Solver

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CoupledNewton(Checked, Solver):
    """Coupled Newton iteration, see `matrix.newton.coupled_newton`.

    Attributes:
      damping: Added to every eigenvalue; absolute, so it depends on the scale of the gradients.
      max_iterations: Most iterations per refresh.
      tolerance: Residual that ends them.
      max_residual: Residual above which a root counts as failed; Meta accepts any finite root,
        `math.inf`.

    Example:
      >>> import jax.numpy as jnp
      >>> root, ok, _ = CoupledNewton()(jnp.diag(jnp.array([16.0, 1.0]))[None], 0.25, ())
      >>> root.round(3).tolist(), ok.tolist()
      ([[[0.5, 0.0], [0.0, 1.0]]], [True])
    """

    damping: Any = 1e-12
    max_iterations: int = 100
    tolerance: Any = 1e-6
    max_residual: Any = newton.MAX_RESIDUAL

    def cost(self, d: int, dtype: Any, exponent: float) -> Cost:
        """Of one iteration."""
        return _iteration(2)

    def check(self, exponent: float) -> None:
        """Refuses exponents that are not 1/p."""
        if newton.rational_root(exponent).denominator != 1:
            raise ValueError(
                f"exponent={exponent} is not 1/p: solver 'coupled_newton' computes integer roots "
                "only, use 'higher_order_newton' or 'eigh'."
            )

    def __call__(self, factor: Array, exponent: float, state: Any) -> tuple[Array, Array, Any]:
        """See `Solver`."""
        self.check(exponent)
        root = newton.rational_root(exponent).numerator
        return *newton.coupled_newton(factor, root, **vars(self))[:2], state


@dataclasses.dataclass(frozen=True)
class HigherOrderNewton(Checked, Solver):
    """Coupled iteration of any order, see `matrix.newton.coupled_higher_order`.

    Attributes:
      relative_damping: Damping relative to the factor's largest absolute row sum.
      absolute_damping: Least damping; absolute.
      max_iterations: Most iterations per refresh.
      tolerance: Residual that ends them.
      order: Of the iteration, at least 2.

    Example:
      >>> import jax.numpy as jnp
      >>> root, ok, _ = HigherOrderNewton()(jnp.diag(jnp.array([8.0, 1.0]))[None], 2 / 3, ())
      >>> root.round(3).tolist(), ok.tolist()
      ([[[0.25, 0.0], [0.0, 1.0]]], [True])
    """

    relative_damping: Any = 1e-6
    absolute_damping: Any = 0.0
    max_iterations: int = 100
    tolerance: Any = 1e-8
    order: int = 3

    def cost(self, d: int, dtype: Any, exponent: float) -> Cost:
        """Of one iteration."""
        return _iteration(self.order)

    def check(self, exponent: float) -> None:
        """Refuses exponents that are no fraction with small terms."""
        newton.rational_root(exponent)

    def __call__(self, factor: Array, exponent: float, state: Any) -> tuple[Array, Array, Any]:
        """See `Solver`."""
        return *newton.coupled_higher_order(factor, exponent, **vars(self))[:2], state


def _iteration(order: int) -> Cost:
    """For a 4th root: a product with X, two for a 4th power, one with M; then the series."""
    return Cost(PRODUCT * (4 + order - 2), "Newton iterations")
