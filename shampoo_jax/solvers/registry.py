"""Solvers by name: what `solver="..."` means, and how to add one's own."""

import functools
from collections.abc import Callable

from shampoo_jax.base.options import refuse
from shampoo_jax.solvers.eigh import ShiftedEigh, TruncatedEigh
from shampoo_jax.solvers.newton import CoupledNewton, HigherOrderNewton
from shampoo_jax.solvers.polynomial import Auto, Polynomial
from shampoo_jax.solvers.solver import Solver

SOLVERS: dict[str, Callable[[], Solver]] = {
    "auto": Auto,
    "eigh": TruncatedEigh,
    "shifted_eigh": ShiftedEigh,
    "coupled_newton": CoupledNewton,
    "higher_order_newton": HigherOrderNewton,
    "polynomial": Polynomial,
    "polynomial_clip": functools.partial(Polynomial, semantics="clip"),
}


def register_solver(name: str, constructor: Callable[[], Solver]) -> None:
    """Makes `solver=name` mean a solver of one's own in every function that takes a solver's name.

    Args:
      name: A name that is not in use.
      constructor: Class or function that returns a `Solver` when it is called without arguments.

    Raises:
      ValueError: The name is taken by another constructor, or is none; no constructor.

    Example:
      >>> import dataclasses, jax.numpy as jnp, shampoo_jax
      >>> @dataclasses.dataclass(frozen=True)
      ... class DiagonalRoot(shampoo_jax.Solver):
      ...     damping: float = 1e-9
      ...     def __call__(self, factor, exponent, state):
      ...         diagonal = jnp.diagonal(factor, axis1=1, axis2=2)
      ...         root = (diagonal + self.damping) ** -exponent
      ...         return root[:, :, None] * jnp.eye(root.shape[1]), jnp.isfinite(root).all(1), state
      >>> shampoo_jax.register_solver("diagonal", DiagonalRoot)
      >>> tx = shampoo_jax.scale_by_shampoo(solver="diagonal", graft=None)
      >>> grads = {"w": jnp.diag(jnp.array([4.0, 9.0]))}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["w"].diagonal().round(3).tolist()  # G (G^2)^(-1/4) (G^2)^(-1/4)
      [1.0, 1.0]
    """
    if not isinstance(name, str) or not name:
        refuse("name", name, " must be a string: solver=name is to mean the solver")
    made = not isinstance(constructor, type) and hasattr(constructor, "init_root")
    if made or not callable(constructor):
        refuse("constructor", constructor, " must give a Solver when it is called: TruncatedEigh")
    if SOLVERS.get(name, constructor) is not constructor:
        raise ValueError(f"solver name {name!r} is taken by {SOLVERS[name]}: choose another one.")
    SOLVERS[name] = constructor


def solver_names() -> tuple[str, ...]:
    """Every name that `solver="..."` may be, those of `register_solver` included.

    >>> solver_names()[:2]
    ('auto', 'eigh')
    """
    return tuple(SOLVERS)


def make_solver(solver: str | Solver) -> Solver:
    """The solver of a name with its defaults, or the given solver itself.

    Args:
      solver: One of `solver_names()`, or a `Solver`.

    Returns:
      The solver.

    Raises:
      ValueError: An unknown name.

    Example:
      >>> make_solver("eigh")
      TruncatedEigh(rtol=None, atol=0.0, implementation=None)
    """
    if isinstance(solver, type) or not (isinstance(solver, str) or hasattr(solver, "init_root")):
        refuse("solver", solver, ": give a name or a Solver, such as TruncatedEigh()")
    if not isinstance(solver, str):
        return solver
    if solver not in SOLVERS:
        raise ValueError(
            f"solver={solver!r} is unknown: choose from {sorted(SOLVERS)}, or pass a Solver such "
            "as TruncatedEigh(rtol=1e-3)."
        )
    return SOLVERS[solver]()
