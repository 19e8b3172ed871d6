"""How an eigenbasis of a factor is refreshed."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from shampoo_jax.base.options import Checked, check_choice, is_off, refuse
from shampoo_jax.matrix import eigh, qr
from shampoo_jax.matrix.batching import map_matrices, map_selected
from shampoo_jax.matrix.products import matmul
from shampoo_jax.solvers.solver import EIGH, PRODUCT, QR, Cost

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class EighBasis(Checked):
    """Eigenvectors by `eigh`, skipped where the old basis still nearly diagonalizes the factor.

    Attributes:
      tolerance: Accepted `|B - diag B|_F / |B|_F` with `B = Q^T A Q`, per factor; 0 decomposes at
        every refresh (Eschenhagen et al. 2025, arXiv:2506.03595).
      descending: Whether the largest eigenvalue comes first. Later QR steps depend on the order.
      implementation: `"qr"`, `"jacobi"`, `"qdwh"` or None, see `matrix.eigh.eigh`.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> factor = jnp.diag(jnp.array([1.0, 4.0]))[None]
      >>> values, basis, order = shampoo_jax.EighBasis(descending=True)(factor, jnp.eye(2)[None])
      >>> values.tolist()
      [[4.0, 1.0]]
    """

    tolerance: Any = 0.0
    descending: bool = False
    implementation: str | None = None

    def cost(self) -> Cost:
        """Of one basis; at most, where some are skipped."""
        return Cost(EIGH, "eigh" if is_off(self.tolerance) else "eigh at most")

    def __call__(
        self, factor: Array, basis: Array, kept: Array | None = None, rtol: float | None = 0.0
    ) -> tuple[Array, Array, Array | None]:
        """Eigenvalues `[N, d]`, basis `[N, d, d]`, and the reordering of old columns: none."""
        del kept, rtol  # only what starts from the old basis has to know
        if is_off(self.tolerance):
            values, basis = eigh.eigh(factor, self.implementation)
        else:
            values, basis = qr.adaptive_eigh(factor, basis, self.tolerance, self.implementation)
        if self.descending:
            values, basis = values[:, ::-1], basis[:, :, ::-1]
        return values, basis, None


@dataclasses.dataclass(frozen=True)
class QRBasis(Checked):
    """Eigenvectors by warm-started QR iterations `Q <- qr(A Q)`.

    Attributes:
      iterations: Largest number of QR decompositions per refresh.
      tolerance: Accepted off-diagonal ratio that ends them early, per factor.
      sort: `"after"` orders the new columns by ascending eigenvalue estimate, as Meta does;
        `"before"` orders the old ones by descending estimate, as SOAP's authors do; None neither.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> factor = jnp.diag(jnp.array([1.0, 4.0]))[None]
      >>> values, basis, order = shampoo_jax.QRBasis(sort="before")(factor, jnp.eye(2)[None])
      >>> values.tolist(), order.tolist()
      ([[4.0, 1.0]], [[1, 0]])
    """

    iterations: int = 1
    tolerance: Any = 0.0
    sort: Literal["before", "after"] | None = "after"

    def cost(self) -> Cost:
        """Of one basis and its eigenvalues."""
        n = self.iterations
        # Eigenvalues cost one product; rotating the factor first, and basis and factor in each
        # step, or one more estimate to sort by.
        products = {"after": 2 + 2 * n, "before": 2 + n, None: 1 + n}[self.sort]
        return Cost(PRODUCT * products + QR * n, f"{n} QR step{'s' if n > 1 else ''}")

    def __call__(
        self, factor: Array, basis: Array, kept: Array | None = None, rtol: float | None = 0.0
    ) -> tuple[Array, Array, Array | None]:
        """Eigenvalue estimates `[N, d]`, basis `[N, d, d]`, and the new order of old columns.

        Estimates of at most `rtol` times the largest are noise: columns that have them keep their
        order. Where it is known which columns were above that before, `kept`, `bool[N, d]`, these
        are orthogonalized first: products of the others need not be independent, and rounding,
        which then chooses columns, shall leave none but those of the null space to choose.
        """
        values, order = eigh.without_noise(eigenvalue_estimates(factor, basis), rtol), None
        if self.sort == "before":
            order = jnp.argsort(-values, axis=-1, stable=True)
            basis = qr.columns(basis, order)
        first = None
        if kept is not None:
            known = jnp.where(kept & (values > 0), -values, 0.0)
            known = known if order is None else jnp.take_along_axis(known, order, -1)
            first = jnp.argsort(known, axis=-1, stable=True)
            basis = qr.columns(basis, first)
        if self.sort == "after":
            options = self.iterations, self.tolerance, rtol
            return *qr.orthogonal_iteration(factor, basis, *options), None
        for _ in range(self.iterations):
            product = matmul(factor, basis)
            scaled = product / eigh.power_of_two_scale(product)
            if is_off(self.tolerance):
                basis = map_matrices(_orthonormal, scaled.shape[:1], scaled)
            else:
                stale = ~(qr.off_diagonal_ratio(factor, basis) <= self.tolerance)
                basis = map_selected(_orthonormal, stale, basis, scaled)
        if first is not None:
            basis = qr.columns(basis, jnp.argsort(first, axis=-1))
        return eigenvalue_estimates(factor, basis), basis, order


def _orthonormal(matrix: Array) -> Array:
    return jnp.linalg.qr(matrix)[0]


Basis = EighBasis | QRBasis


def reorders(basis: Basis) -> bool:
    """Whether a refresh reports how it reordered the old columns."""
    return isinstance(basis, QRBasis) and basis.sort == "before"


def ascends(basis: Basis) -> bool:
    """Whether refreshes put the smallest eigenvalue first."""
    return not basis.descending if isinstance(basis, EighBasis) else basis.sort == "after"


def make_basis(basis: str | Basis | None, *, keep_order: bool = False) -> Basis:
    """A basis method by name: `"eigh"`, `"qr"` (Meta's), None for SOAP's sorted QR step.

    With `keep_order` the same without sorting, or for `"eigh"` in the descending order of the first
    basis: eigenvalues that are tracked apart stay with their columns.

    Raises:
      ValueError: An unknown name, or with `keep_order` a basis that sorts.
    """
    if basis is None or isinstance(basis, str):
        check_choice("basis", basis, ("eigh", "qr", None))
        if basis == "eigh":
            return EighBasis(descending=keep_order)
        return QRBasis(sort=None if keep_order else "before" if basis is None else "after")
    if not isinstance(basis, (EighBasis, QRBasis)):
        refuse("basis", basis, ": give 'eigh', 'qr', None, EighBasis() or QRBasis()")
    if keep_order and (ascends(basis) or reorders(basis)):
        raise ValueError(
            f"basis={basis} sorts columns, their tracked eigenvalues stay: use QRBasis(sort=None) "
            "or EighBasis(descending=True)."
        )
    return basis


def eigenvalue_estimates(factor: Array, basis: Array) -> Array:
    """`diag(Q^T A Q)` of each matrix of a stack, `[N, d]`."""
    product = matmul(factor, basis)
    return jnp.sum(basis * product, axis=-2)
