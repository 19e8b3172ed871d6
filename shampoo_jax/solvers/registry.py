"""Solvers by name: what `solver="..."` means, and how to add one's own."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from shampoo_jax.base.options import is_off
from shampoo_jax.solvers.polynomial import Auto, Polynomial
from shampoo_jax.solvers.solver import (
    CoupledNewton,
    HigherOrderNewton,
    ShiftedEigh,
    Solver,
    TruncatedEigh,
)


def _truncated_eigh(cutoff: str = "relative", rtol: Any = None, atol: Any = 0.0) -> Solver:
    if cutoff == "relative":
        return TruncatedEigh(rtol, atol)
    if rtol is not None or not is_off(atol):
        raise ValueError(
            f"cutoff='positive' keeps every eigenvalue above 0, so rtol={rtol} and atol={atol} "
            "have no meaning: drop them or use cutoff='relative'."
        )
    return TruncatedEigh(0.0, 0.0)


def _auto(cutoff: str = "relative", rtol: Any = None, atol: Any = 0.0) -> Solver:
    relative = cutoff == "relative" and is_off(atol)  # polynomials have no other cutoff
    return Auto(rtol) if relative else _truncated_eigh(cutoff, rtol, atol)


def _higher_order_newton(eps: Any = None) -> Solver:
    return HigherOrderNewton() if eps is None else HigherOrderNewton(0.0, eps)


# Name -> constructor; its parameters among cutoff, rtol, atol and eps are the options it accepts.
SOLVERS: dict[str, Callable[..., Solver]] = {
    "auto": _auto,
    "eigh": _truncated_eigh,
    "shifted_eigh": ShiftedEigh,
    "coupled_newton": CoupledNewton,
    "higher_order_newton": _higher_order_newton,
    "polynomial": Polynomial,
    "polynomial_clip": functools.partial(Polynomial, semantics="clip"),
}


def register_solver(name: str, constructor: Callable[..., Solver]) -> None:
    """Makes `solver=name` mean a solver of one's own in every function that takes a solver's name.

    Args:
      name: A name that is not in use.
      constructor: Class or function that returns a `Solver`. Those of its parameters that are
        called `cutoff`, `rtol`, `atol` and `eps` receive the options of these names where they are
        given, so it needs defaults for them; the others are refused with this solver.

    Raises:
      ValueError: The name is taken by another constructor.

    Example:
      >>> import dataclasses, jax.numpy as jnp, shampoo_jax
      >>> @dataclasses.dataclass(frozen=True)
      ... class DiagonalRoot(shampoo_jax.Solver):
      ...     eps: float = 1e-6
      ...     def __call__(self, factor, exponent, state):
      ...         diagonal = jnp.diagonal(factor, axis1=1, axis2=2)
      ...         root = (diagonal + self.eps) ** -exponent
      ...         return root[:, :, None] * jnp.eye(root.shape[1]), jnp.isfinite(root).all(1), state
      >>> shampoo_jax.register_solver("diagonal", DiagonalRoot)
      >>> tx = shampoo_jax.scale_by_shampoo(solver="diagonal", eps=1e-9, graft=None)
      >>> grads = {"w": jnp.diag(jnp.array([4.0, 9.0]))}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["w"].diagonal().round(3).tolist()  # G (G^2)^(-1/4) (G^2)^(-1/4)
      [1.0, 1.0]
    """
    if SOLVERS.get(name, constructor) is not constructor:
        raise ValueError(f"solver name {name!r} is taken by {SOLVERS[name]}: choose another one.")
    SOLVERS[name] = constructor


def make_solver(
    solver: str | Solver,
    *,
    cutoff: str = "relative",
    rtol: Any = None,
    atol: Any = 0.0,
    eps: Any = None,
) -> Solver:
    """The solver of a name and plain options, or the given solver itself.

    Args:
      solver: A registered name, or any `Solver`.
      cutoff: `"relative"` keeps eigenvalues above `max(rtol * largest, atol)`; `"positive"` keeps
        every eigenvalue above 0, rounding noise included, as record 35 of track 3 does.
      rtol: Relative cutoff; None means `d * eps` of the factor's dtype.
      atol: Absolute cutoff.
      eps: Damping of the solvers that have one; None means the solver's own default.

    Returns:
      A `Solver`.

    Raises:
      ValueError: An unknown name, or options that contradict the solver or each other.
    """
    if cutoff not in ("relative", "positive"):
        raise ValueError(f"cutoff={cutoff!r} is unknown: use 'relative' or 'positive'.")
    options = {"rtol": rtol, "atol": atol, "eps": eps}
    options |= {"cutoff": cutoff} if cutoff == "positive" else {}
    given = {name: value for name, value in options.items() if value is not None}
    # Zeros ask for nothing, so every solver can do with them.
    asked = {name: value for name, value in given.items() if not is_off(value)}
    if not isinstance(solver, str):
        if asked:
            raise ValueError(
                f"{asked} given together with a solver object {solver!r}: set these on the solver "
                "itself."
            )
        return solver
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown: choose from {sorted(SOLVERS)}.")
    accepted = _accepted(solver)
    for name in [name for name in asked if name not in accepted]:
        others = [repr(other) for other in sorted(SOLVERS) if name in _accepted(other)]
        raise ValueError(
            f"{name}={asked[name]!r} has no meaning with solver={solver!r}: drop it, or use a "
            f"solver that has it, {' or '.join(others)}."
        )
    return SOLVERS[solver](**{name: given[name] for name in given.keys() & accepted})


def _accepted(solver: str) -> set[str]:
    """The options that the solver of this name accepts."""
    return set(inspect.signature(SOLVERS[solver]).parameters)
