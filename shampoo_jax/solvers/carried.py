"""Roots computed through an eigenbasis that is carried from one refresh to the next."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shampoo_jax.base.options import Checked, check_options, is_off, refuse
from shampoo_jax.matrix import eigh
from shampoo_jax.matrix.products import identity_like
from shampoo_jax.solvers.bases import Basis, EighBasis, QRBasis
from shampoo_jax.solvers.solver import PRODUCT, Cost, Solver, identities

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CarriedBasis(Checked, Solver):
    """A solver that keeps each factor's eigenbasis from one refresh to the next.

    With `EighBasis()` it equals `TruncatedEigh` or `ShiftedEigh`; with a tolerance or `QRBasis` the
    decomposition becomes approximate and cheaper.

    Attributes:
      basis: How the eigenbasis is refreshed. With damping QR steps keep Meta's order, the smallest
        first, in which rounding grows by the condition number at every refresh.
      damping: As in `ShiftedEigh`; None truncates instead, as `TruncatedEigh`.
      before: Whether it is added to the matrix before the decomposition.
      rtol: Relative cutoff where damping is None; None means `d * eps` of the dtype.
      atol: Absolute cutoff where damping is None.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.scale_by_shampoo(solver=shampoo_jax.CarriedBasis(shampoo_jax.QRBasis()))
    """

    basis: Basis = EighBasis()
    damping: Any = None
    before: bool = True
    rtol: Any = None
    atol: Any = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for damping with a cutoff and what `Checked` refuses."""
        if not isinstance(self.basis, (EighBasis, QRBasis)):
            refuse("basis", self.basis, ": give EighBasis() or QRBasis()")
        check_options({n: x for n, x in vars(self).items() if n != "damping" or x is not None})
        if self.damping is not None and not (self.rtol is None and is_off(self.atol)):
            raise ValueError(
                f"rtol={self.rtol}, atol={self.atol} with damping={self.damping}: a damped "
                "spectrum is not truncated, drop damping or the cutoffs."
            )

    def cost(self, d: int, dtype: Any, exponent: float) -> Cost:
        """That of the basis, and a product."""
        cost = self.basis.cost()
        return cost._replace(flops=cost.flops + PRODUCT)

    def init(self, n: int, d: int, dtype: Any) -> Array:
        """Identity bases `[N, d, d]`."""
        return identities(n, d, dtype)

    def init_root(self, n: int, d: int, dtype: Any, exponent: float) -> Array:
        """The root of an eigendecomposition with all eigenvalues 1, under this solver's rule."""
        powers = self._powers(exponent)(jnp.ones((n, d), dtype))
        return (powers[:, :, None] * identities(n, d, dtype)).astype(dtype)

    def __call__(self, factor: Array, exponent: float, state: Array) -> tuple[Array, Array, Array]:
        """See `Solver`."""
        if self.damping is not None and self.before:
            factor = factor + self.damping * identity_like(factor)

        # Truncated, the largest directions are orthogonalized first: from the smallest on, as Meta
        # does where it damps, rounding grows by the ratio of the two at every refresh.
        known = jnp.ones(state.shape[:-1], bool) if self.damping is None else None

        def refreshed(factor: Array) -> tuple[Array, Array]:
            return self.basis(factor, state, known, self.rtol)[:2]

        return eigh.spectral_root(factor, exponent, self._powers(exponent), refreshed)

    def root(self, values: Array, vectors: Array, exponent: float) -> Array:
        """Roots `[n, d, d]` of eigendecompositions that are kept, `[n, d]` and `[n, d, d]`.

        With damping `before` the values have to hold it, as a call computes them.
        """
        return eigh.reconstruct(self._powers(exponent)(values), vectors)

    def _powers(self, exponent: float) -> Callable[..., Array]:
        """The rule for eigenvalues, see `spectral_root`."""
        options = {"exponent": exponent, "rtol": self.rtol, "atol": self.atol}
        if self.damping is None:
            return functools.partial(eigh.truncated_power, **options)
        options = {"exponent": exponent, "damping": self.damping, "added": self.before}
        return functools.partial(eigh.shifted_power, **options)
