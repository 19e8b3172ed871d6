"""Inverse-root solvers: what `invert_roots` calls on each stack of factors."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from shampoo_jax.base.options import Checked
from shampoo_jax.matrix import eigh, newton

Array = jax.Array


class Solver(Protocol):
    """Computes `factor^(-exponent)` for a stack of factors.

    A call takes factors `[N, d, d]`, a positive float and the state that it returned last time; it
    returns roots `[N, d, d]`, `ok` as `bool[N]`, and the new state. Where `ok` is false the caller
    keeps the previous root and state. A subclass that keeps nothing between refreshes and computes
    every real exponent has to define the call only.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> class DiagonalRoot(shampoo_jax.Solver):
      ...     def __call__(self, factor, exponent, state):
      ...         diagonal = jnp.diagonal(factor, axis1=1, axis2=2)
      ...         inverse = jnp.where(diagonal > 0, diagonal, 1.0) ** -exponent
      ...         root = jnp.where(diagonal > 0, inverse, 0.0)[..., None] * jnp.eye(len(factor[0]))
      ...         return root, jnp.isfinite(root).all((1, 2)), state
      >>> tx = shampoo_jax.scale_by_shampoo(solver=DiagonalRoot())
      >>> grads = {"w": jnp.array([[3.0, 0.0], [0.0, 0.5]])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["w"].round(2).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """

    def check(self, exponent: float) -> None:
        """Raises ValueError for an exponent that this solver cannot compute; here for none."""
        del exponent

    def init(self, n: int, d: int, dtype: Any) -> Any:
        """What is carried between refreshes, arrays with leading axis n; here nothing."""
        del n, d, dtype
        return ()

    def init_root(self, n: int, d: int, dtype: Any, exponent: float) -> Array:
        """Roots `[n, d, d]` until the first refresh; here identities."""
        del exponent
        return identities(n, d, dtype)

    def figures(self, state: Any) -> dict[str, Array]:
        """What a monitor can report of the state, arrays `[n]` by name; here nothing."""
        del state
        return {}

    def __call__(self, factor: Array, exponent: float, state: Any) -> tuple[Array, Array, Any]:
        """Roots, whether each can be used, and the new state."""
        ...


def identities(n: int, d: int, dtype: Any) -> Array:
    """A stack of n identity matrices `[n, d, d]`."""
    return jnp.broadcast_to(jnp.eye(d, dtype=dtype), (n, d, d))


@dataclasses.dataclass(frozen=True)
class TruncatedEigh(Checked, Solver):
    """Eigendecomposition with a pseudo-inverse cutoff, see `matrix.eigh.truncated_root`.

    Attributes:
      rtol: Cutoff relative to the largest eigenvalue; None means `d * eps` of the dtype.
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

    def __call__(self, factor: Array, exponent: float, state: Any) -> tuple[Array, Array, Any]:
        """See `Solver`."""
        options = {"rtol": self.rtol, "atol": self.atol, "implementation": self.implementation}
        return *eigh.truncated_root(factor, exponent, **options), state


@dataclasses.dataclass(frozen=True)
class ShiftedEigh(Checked, Solver):
    """Eigendecomposition of `A + eps I`, see `matrix.eigh.shifted_root`.

    Attributes:
      eps: Added to every eigenvalue; absolute, so it depends on the scale of the gradients. With 0
        nothing is damped: a singular factor has no root and keeps the old one.
      before: Whether eps is added before the decomposition.
      implementation: As in `TruncatedEigh`.

    Example:
      >>> import jax.numpy as jnp
      >>> root, ok, _ = ShiftedEigh(eps=1.0)(jnp.diag(jnp.array([15.0, 0.0]))[None], 0.25, ())
      >>> root.round(4).tolist(), ok.tolist()
      ([[[0.5, 0.0], [0.0, 1.0]]], [True])
    """

    eps: Any = 1e-12
    before: bool = True
    implementation: str | None = None

    def __call__(self, factor: Array, exponent: float, state: Any) -> tuple[Array, Array, Any]:
        """See `Solver`."""
        options = {"eps": self.eps, "before": self.before, "implementation": self.implementation}
        return *eigh.shifted_root(factor, exponent, **options), state


@dataclasses.dataclass(frozen=True)
class CoupledNewton(Checked, Solver):
    """Coupled Newton iteration, see `matrix.newton.coupled_newton`.

    Attributes:
      eps: Added to every eigenvalue; absolute, so it depends on the scale of the gradients.
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

    eps: Any = 1e-12
    max_iterations: int = 100
    tolerance: Any = 1e-6
    max_residual: Any = newton.MAX_RESIDUAL

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
        result = newton.coupled_newton(
            factor,
            newton.rational_root(exponent).numerator,
            self.eps,
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
            max_residual=self.max_residual,
        )
        return result.root, result.ok, state


@dataclasses.dataclass(frozen=True)
class HigherOrderNewton(Checked, Solver):
    """Coupled iteration of any order, see `matrix.newton.coupled_higher_order`.

    Attributes:
      rel_epsilon: Damping relative to the factor's largest absolute row sum.
      abs_epsilon: Least damping; absolute.
      max_iterations: Most iterations per refresh.
      tolerance: Residual that ends them.
      order: Of the iteration, at least 2.

    Example:
      >>> import jax.numpy as jnp
      >>> root, ok, _ = HigherOrderNewton()(jnp.diag(jnp.array([8.0, 1.0]))[None], 2 / 3, ())
      >>> root.round(3).tolist(), ok.tolist()
      ([[[0.25, 0.0], [0.0, 1.0]]], [True])
    """

    rel_epsilon: Any = 1e-6
    abs_epsilon: Any = 0.0
    max_iterations: int = 100
    tolerance: Any = 1e-8
    order: int = 3

    def check(self, exponent: float) -> None:
        """Refuses exponents that are no fraction with small terms."""
        newton.rational_root(exponent)

    def __call__(self, factor: Array, exponent: float, state: Any) -> tuple[Array, Array, Any]:
        """See `Solver`."""
        result = newton.coupled_higher_order(
            factor,
            exponent,
            self.rel_epsilon,
            self.abs_epsilon,
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
            order=self.order,
        )
        return result.root, result.ok, state
