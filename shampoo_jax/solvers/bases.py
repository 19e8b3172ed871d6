"""How an eigenbasis of a factor is refreshed, and roots computed through a carried eigenbasis."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from shampoo_jax.base.options import Checked, is_off
from shampoo_jax.matrix import eigh, qr
from shampoo_jax.matrix.batching import map_matrices, map_selected
from shampoo_jax.solvers.solver import Solver, identities

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

    def __call__(self, factor: Array, basis: Array) -> tuple[Array, Array, Array | None]:
        """Eigenvalues `[N, d]`, basis `[N, d, d]`, and the reordering of old columns: none."""
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

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown order and what `Checked` refuses."""
        super().__post_init__()
        if self.sort not in ("before", "after", None):
            raise ValueError(f"sort={self.sort!r}: use 'before', 'after' or None.")

    def __call__(self, factor: Array, basis: Array) -> tuple[Array, Array, Array | None]:
        """Eigenvalue estimates `[N, d]`, basis `[N, d, d]`, and the new order of old columns."""
        if self.sort == "after":
            values, basis = qr.orthogonal_iteration(factor, basis, self.iterations, self.tolerance)
            return values, basis, None
        order = None
        if self.sort == "before":
            order = jnp.argsort(-eigenvalue_estimates(factor, basis), axis=-1, stable=True)
            basis = jnp.take_along_axis(basis, order[:, None, :], axis=2)
        for _ in range(self.iterations):
            product = jnp.matmul(factor, basis, precision=eigh.HIGHEST)
            scaled = product / eigh.power_of_two_scale(product)
            if is_off(self.tolerance):
                basis = map_matrices(_orthonormal, scaled.shape[:1], scaled)
            else:
                stale = ~(qr.off_diagonal_ratio(factor, basis) <= self.tolerance)
                basis = map_selected(_orthonormal, stale, basis, scaled)
        return eigenvalue_estimates(factor, basis), basis, order


def _orthonormal(matrix: Array) -> Array:
    return jnp.linalg.qr(matrix)[0]


Basis = EighBasis | QRBasis


def reorders(basis: Basis) -> bool:
    """Whether a refresh reports how it reordered the old columns."""
    return isinstance(basis, QRBasis) and basis.sort == "before"


def make_basis(basis: str | Basis | None, *, keep_order: bool = False) -> Basis:
    """A basis method by name: `"eigh"`, `"qr"` (Meta's), None for SOAP's sorted QR step.

    With `keep_order` the same without sorting, or for `"eigh"` in the descending order of the first
    basis: eigenvalues that are tracked apart stay with their columns.

    Raises:
      ValueError: An unknown name.
    """
    if isinstance(basis, (EighBasis, QRBasis)):
        return basis
    named = {
        "eigh": EighBasis(descending=keep_order),
        "qr": QRBasis(sort=None if keep_order else "after"),
        None: QRBasis(sort=None if keep_order else "before"),
    }
    if basis not in named:
        raise ValueError(f"basis={basis!r} is unknown: use 'eigh', 'qr', EighBasis or QRBasis.")
    return named[basis]


def eigenvalue_estimates(factor: Array, basis: Array) -> Array:
    """`diag(Q^T A Q)` of each matrix of a stack, `[N, d]`."""
    product = jnp.matmul(factor, basis, precision=eigh.HIGHEST)
    return jnp.sum(basis * product, axis=-2)


@dataclasses.dataclass(frozen=True)
class CarriedBasis(Checked, Solver):
    """A solver that keeps each factor's eigenbasis from one refresh to the next.

    With `EighBasis()` it equals `TruncatedEigh` or `ShiftedEigh`; with a tolerance or `QRBasis` the
    decomposition becomes approximate and cheaper.

    Attributes:
      basis: How the eigenbasis is refreshed.
      eps: Damping as in `ShiftedEigh`; None truncates instead, as `TruncatedEigh`.
      before: Whether eps is added to the matrix before the decomposition.
      rtol: Relative cutoff where eps is None; None means `d * eps` of the dtype.
      atol: Absolute cutoff where eps is None.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.scale_by_shampoo(solver=shampoo_jax.CarriedBasis(shampoo_jax.QRBasis()))
    """

    basis: Basis = EighBasis()
    eps: Any = None
    before: bool = True
    rtol: Any = None
    atol: Any = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for damping with a cutoff and what `Checked` refuses."""
        super().__post_init__()
        if self.eps is not None and not (self.rtol is None and is_off(self.atol)):
            raise ValueError(
                f"rtol={self.rtol}, atol={self.atol} with eps={self.eps}: a damped spectrum is not "
                "truncated, drop eps or the cutoffs."
            )

    def init(self, n: int, d: int, dtype: Any) -> Array:
        """Identity bases `[N, d, d]`."""
        return identities(n, d, dtype)

    def init_root(self, n: int, d: int, dtype: Any, exponent: float) -> Array:
        """The root of an eigendecomposition with all eigenvalues 1, under this solver's rule."""
        powers = self._powers(jnp.ones((n, d), dtype), exponent, 1.0)
        return (powers[:, :, None] * jnp.eye(d, dtype=dtype)).astype(dtype)

    def __call__(self, factor: Array, exponent: float, state: Array) -> tuple[Array, Array, Array]:
        """See `Solver`."""
        if self.eps is not None and self.before:
            factor = factor + self.eps * jnp.eye(factor.shape[-1], dtype=factor.dtype)
        ok = eigh.finite(factor)
        scale = eigh.power_of_two_scale(factor)
        safe = jnp.where(ok[:, None, None], factor / scale, jnp.zeros_like(factor))
        values, basis, _ = self.basis(safe, state)
        powers = self._powers(values, exponent, scale[..., 0])
        root = eigh.reconstruct(powers, basis) * scale**-exponent
        return root, ok & eigh.finite(root), basis

    def _powers(self, values: Array, exponent: float, unit: Array | float) -> Array:
        """Powers of eigenvalues `[N, d]` that are given in a unit."""
        if self.eps is None:
            return eigh.truncated_power(values, exponent, rtol=self.rtol, atol=self.atol / unit)
        return eigh.shifted_power(values, exponent, eps=self.eps / unit, eps_added=self.before)
