"""What a refresh of one root or basis costs: operations, products, memory."""

from typing import Any, NamedTuple

import jax

from shampoo_jax.base.options import is_off
from shampoo_jax.matrix import polynomial
from shampoo_jax.solvers.bases import Basis, CarriedBasis, EighBasis
from shampoo_jax.solvers.polynomial import Auto, Polynomial
from shampoo_jax.solvers.solver import (
    CoupledNewton,
    HigherOrderNewton,
    ShiftedEigh,
    Solver,
    TruncatedEigh,
)

# Multiples of d^3 for a d x d matrix. A product, such as Q diag(w^-e) Q^T.
PRODUCT = 2.0
# Golub and Van Loan, Matrix Computations, 4th edition, algorithm 8.3.3: eigenvalues and
# eigenvectors of a symmetric matrix by tridiagonal QR, 4/3 of which is the reduction.
EIGH = 9.0
# Algorithm 5.2.1, Householder QR, and as much again to form Q.
QR = 8 / 3


class Cost(NamedTuple):
    """Of one factor.

    Attributes:
      flops: Multiple of d^3; for Newton's methods, of one iteration.
      method: In words.
      matrices: Temporary d x d matrices at a time, as XLA allocates them; eigh's with workspace.
      fallback: Whether the program also holds an eigh for roots that fail.
    """

    flops: float
    method: str
    matrices: int = 5
    fallback: bool = False


def root_cost(solver: Solver | None, d: int, dtype: Any, exponent: float) -> Cost:
    """Cost of the root `A^(-exponent)` of a factor `[d, d]`; None is an unknown solver."""
    match solver:
        case Auto():
            backend, factor = jax.default_backend(), jax.ShapeDtypeStruct((d, d), dtype)
            cost = root_cost(solver.choice(factor, exponent, backend), d, dtype, exponent)
            return cost._replace(method=f"{cost.method} (auto on {backend})")
        case Polynomial():
            factor, p = jax.ShapeDtypeStruct((d, d), dtype), polynomial.integer_root(exponent)
            cut = solver.semantics == "cut"
            schedule = polynomial.root_schedule(
                factor, p, solver.semantics, solver.rtol, solver.sign_steps
            )
            count = polynomial.count_products(schedule, p)
            return Cost(PRODUCT * count, f"{count} products", 6 if cut else 5, fallback=True)
        case CoupledNewton() | HigherOrderNewton():
            # For a 4th root: one product with X, two for a 4th power, one with M; then the series.
            cost = PRODUCT * (4 + getattr(solver, "order", 2) - 2)
            return Cost(cost, "Newton iterations")
        case TruncatedEigh() | ShiftedEigh():
            cost = Cost(EIGH, "eigh")
        case CarriedBasis():
            cost = basis_cost(solver.basis)
        case _:
            cost = Cost(EIGH, "a method of its own, counted as eigh")
    return cost._replace(flops=cost.flops + PRODUCT)


def basis_cost(basis: Basis) -> Cost:
    """Likewise without a root: eigenvectors and eigenvalues alone."""
    if isinstance(basis, EighBasis):
        return Cost(EIGH, "eigh" if is_off(basis.tolerance) else "eigh at most")
    n = basis.iterations
    # Eigenvalues cost one product; rotating the factor first, and basis and factor in each step,
    # or one more estimate to sort by.
    products = {"after": 2 + 2 * n, "before": 2 + n, None: 1 + n}[basis.sort]
    return Cost(PRODUCT * products + QR * n, f"{n} QR step{'s' if n > 1 else ''}")
