"""Named inverse-root solvers: what `invert_roots` calls on each stack of factors."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from shampoo_jax.matrix import eigh, newton

Array = jax.Array


class Solver(Protocol):
    """Computes `factor^(-exponent)` for a stack of factors.

    `init` gives what the solver carries from one refresh to the next, arrays with leading axis N
    (an eigenbasis to start from, say), or `()`; `init_root` gives the roots `[N, d, d]` in use
    until the first refresh. A call takes factors `[N, d, d]`, a positive float and that state; it
    returns roots `[N, d, d]`, `ok` as `bool[N]`, and the new state. Where `ok` is false the caller
    keeps the previous root and state. `check` raises ValueError for an exponent that the solver
    cannot compute.
    """

    def check(self, exponent: float) -> None:
        """Refuses an exponent before any work."""
        ...

    def init(self, n: int, d: int, dtype: Any) -> Any:
        """State for a stack of n factors of size d."""
        ...

    def init_root(self, n: int, d: int, dtype: Any, exponent: float) -> Array:
        """Roots of a stack before its first refresh."""
        ...

    def __call__(self, factor: Array, exponent: float, state: Any) -> tuple[Array, Array, Any]:
        """Roots, whether each can be used, and the new state."""
        ...


class AnyExponent:
    """A solver that computes every real exponent."""

    def check(self, exponent: float) -> None:
        """Nothing to refuse."""
        del exponent


class Stateless:
    """A solver that starts every refresh from the factor alone; its first roots are identities."""

    def init(self, n: int, d: int, dtype: Any) -> Any:
        """Nothing to carry."""
        del n, d, dtype
        return ()

    def init_root(self, n: int, d: int, dtype: Any, exponent: float) -> Array:
        """Identity matrices."""
        del exponent
        return identities(n, d, dtype)


def identities(n: int, d: int, dtype: Any) -> Array:
    """A stack of n identity matrices `[N, d, d]`."""
    return jnp.broadcast_to(jnp.eye(d, dtype=dtype), (n, d, d))


@dataclasses.dataclass(frozen=True)
class TruncatedEigh(AnyExponent, Stateless):
    """Eigendecomposition with a pseudo-inverse cutoff, see `matrix.eigh.truncated_root`.

    Attributes:
      rtol: Cutoff relative to the largest eigenvalue; None means `d * eps` of the dtype.
      atol: Absolute cutoff; depends on the scale of the gradients.
    """

    rtol: Any = None
    atol: Any = 0.0

    def __call__(self, factor: Array, exponent: float, state: Any) -> tuple[Array, Array, Any]:
        """See `Solver`."""
        return *eigh.truncated_root(factor, exponent, rtol=self.rtol, atol=self.atol), state


@dataclasses.dataclass(frozen=True)
class ShiftedEigh(AnyExponent, Stateless):
    """Eigendecomposition of `A + eps I`, see `matrix.eigh.shifted_root`.

    Attributes:
      eps: Added to every eigenvalue; absolute, so it depends on the scale of the gradients.
      before: Whether eps is added before the decomposition.
    """

    eps: Any = 1e-12
    before: bool = True

    def __call__(self, factor: Array, exponent: float, state: Any) -> tuple[Array, Array, Any]:
        """See `Solver`."""
        return *eigh.shifted_root(factor, exponent, eps=self.eps, before=self.before), state


@dataclasses.dataclass(frozen=True)
class CoupledNewton(Stateless):
    """Coupled Newton iteration, see `matrix.newton.coupled_newton`.

    Attributes:
      eps: Added to every eigenvalue; absolute, so it depends on the scale of the gradients.
      max_iterations: Most iterations per refresh.
      tolerance: Residual that ends them.
      max_residual: Residual above which a root counts as failed; Meta accepts any finite root,
        `math.inf`.
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
class HigherOrderNewton(Stateless):
    """Coupled iteration of any order, see `matrix.newton.coupled_higher_order`.

    Attributes:
      rel_epsilon: Damping relative to the factor's largest absolute row sum.
      abs_epsilon: Least damping; absolute.
      max_iterations: Most iterations per refresh.
      tolerance: Residual that ends them.
      order: Of the iteration, at least 2.
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


def make_solver(
    solver: str | Solver,
    *,
    cutoff: str = "relative",
    rtol: Any = None,
    atol: Any = 0.0,
    eps: Any = 0.0,
) -> Solver:
    """The solver of a name and plain options, or the given solver itself.

    Args:
      solver: A name in `SOLVERS`, or any `Solver`.
      cutoff: `"relative"` keeps eigenvalues above `max(rtol * largest, atol)`; `"positive"` keeps
        every eigenvalue above 0, rounding noise included, as record 35 of track 3 does.
      rtol: Relative cutoff; None means `d * eps` of the factor's dtype.
      atol: Absolute cutoff.
      eps: Damping of the solvers that have one.

    Returns:
      A `Solver`.

    Raises:
      ValueError: An unknown name, or options that contradict the solver or each other.
    """
    given = {"rtol": rtol is not None, "atol": not _is_zero(atol), "eps": not _is_zero(eps)}
    set_options = [name for name, is_set in given.items() if is_set]
    if cutoff not in ("relative", "positive"):
        raise ValueError(f"cutoff={cutoff!r} is unknown: use 'relative' or 'positive'.")
    if not isinstance(solver, str):
        if set_options or cutoff == "positive":
            raise ValueError(
                f"{set_options or 'cutoff'} given together with a solver object {solver!r}: set "
                "these on the solver itself."
            )
        return solver
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown: choose from {sorted(SOLVERS)}.")
    return SOLVERS[solver](cutoff, rtol, atol, eps)


def _is_zero(x: Any) -> bool:
    return isinstance(x, (int, float)) and x == 0


def _truncated(cutoff: str, rtol: Any, atol: Any, eps: Any) -> Solver:
    if not _is_zero(eps):
        raise ValueError(
            f"eps={eps} has no meaning with the truncated solver 'eigh': drop eps, or use "
            "solver='shifted_eigh'."
        )
    if cutoff == "relative":
        return TruncatedEigh(rtol, atol)
    if rtol is not None or not _is_zero(atol):
        raise ValueError(
            f"cutoff='positive' keeps every eigenvalue above 0, so rtol={rtol} and atol={atol} "
            "have no meaning: drop them or use cutoff='relative'."
        )
    return TruncatedEigh(0.0, 0.0)


def _shifted(cutoff: str, rtol: Any, atol: Any, eps: Any) -> Solver:
    _refuse_cutoff("shifted_eigh", cutoff, rtol, atol)
    return ShiftedEigh(1e-12 if _is_zero(eps) else eps)


def _coupled_newton(cutoff: str, rtol: Any, atol: Any, eps: Any) -> Solver:
    _refuse_cutoff("coupled_newton", cutoff, rtol, atol)
    return CoupledNewton(1e-12 if _is_zero(eps) else eps)


def _higher_order_newton(cutoff: str, rtol: Any, atol: Any, eps: Any) -> Solver:
    _refuse_cutoff("higher_order_newton", cutoff, rtol, atol)
    return HigherOrderNewton() if _is_zero(eps) else HigherOrderNewton(0.0, eps)


def _refuse_cutoff(name: str, cutoff: str, rtol: Any, atol: Any) -> None:
    if cutoff == "positive" or rtol is not None or not _is_zero(atol):
        raise ValueError(
            f"solver={name!r} truncates nothing, so cutoff={cutoff!r}, rtol={rtol}, atol={atol} "
            "have no meaning with it: drop them, or use solver='eigh'."
        )


# Name -> constructor of (cutoff, rtol, atol, eps).
SOLVERS: dict[str, Callable[[str, Any, Any, Any], Solver]] = {
    "eigh": _truncated,
    "shifted_eigh": _shifted,
    "coupled_newton": _coupled_newton,
    "higher_order_newton": _higher_order_newton,
}
