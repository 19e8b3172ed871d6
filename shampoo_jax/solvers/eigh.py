"""Solvers by symmetric eigendecomposition: the options of `matrix.eigh`, kept as objects."""

import dataclasses
from typing import Any

import jax

from shampoo_jax.base.options import Checked, refuse
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

    @property
    def swift(self) -> bool:
        """With the default cutoff."""
        return self.rtol is None

    def cost(self, d: int, dtype: Any, exponent: float) -> Cost:
        """A decomposition and a product."""
        return Cost(EIGH + PRODUCT, "eigh")

    def __call__(
        self, factor: Array, exponent: float, state: Any, samples: Array | None = None
    ) -> tuple[Array, Array, Any]:
        """See `Solver`; samples as in `matrix.eigh.spectral_root`."""
        return *eigh.truncated_root(factor, exponent, samples=samples, **vars(self)), state


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

    def __call__(
        self, factor: Array, exponent: float, state: Any, samples: Array | None = None
    ) -> tuple[Array, Array, Any]:
        """See `Solver`; samples as in `matrix.eigh.spectral_root`."""
        return *eigh.shifted_root(factor, exponent, samples=samples, **vars(self)), state


@dataclasses.dataclass(frozen=True)
class Debiased(Checked, Solver):
    """The inverse root of another solver, corrected for the noise of this step's gradients.

    An inverse power of a noisy eigenvalue is too large on average. In each eigendirection q

      `l^-e  ->  max(l^-e - e (e + 1) / 2 * l^-(e + 2) * Var, 0)`,

    where Var is the variance of the mean over microbatches of `w |G_j^T q|^2`, w the weight of the
    newest gradients in the factor: the sum of squared deviations over `m (m - 1)`. The noise of
    earlier gradients is not counted. Source: arXiv:2605.20756, for e = 1/4.

    Attributes:
      solver: Gives eigenvalues and what is made of them; its cutoffs hold before the correction.
      microbatches: Name of the tree in the extra argument `further` that has the gradients of at
        least two microbatches, see `blocked`.

    Raises:
      ValueError: Another solver; in `update`, no such tree, a single microbatch, or statistics that
        do not say with what weight the newest gradients count: those of `accumulate_factors` do,
        unless `damp` or `normalize_by_trace` come after it.

    Example:
      >>> import jax, jax.numpy as jnp, shampoo_jax
      >>> tx = shampoo_jax.scale_by_shampoo(
      ...     statistics=shampoo_jax.accumulate_factors(0.9, microbatches="microbatches"),
      ...     solver=Debiased(),
      ... )
      >>> params = {"w": jnp.ones((3, 2))}
      >>> micro = {"w": jax.random.normal(jax.random.key(0), (4, 3, 2))}
      >>> mean, further = {"w": micro["w"].mean(0)}, {"microbatches": micro}
      >>> updates, state = tx.update(mean, tx.init(params), further=further)
    """

    solver: TruncatedEigh | ShiftedEigh = TruncatedEigh()
    microbatches: str = "microbatches"

    def __post_init__(self) -> None:
        """Raises ValueError for a solver that has no spectrum to correct."""
        if not isinstance(self.solver, (TruncatedEigh, ShiftedEigh)):
            refuse("solver", self.solver, ": give TruncatedEigh(...) or ShiftedEigh(...)")
        super().__post_init__()

    @property
    def rtol(self) -> Any:
        """That of the solver, for checks of pairs of options."""
        return getattr(self.solver, "rtol", None)

    @property
    def atol(self) -> Any:
        """Likewise."""
        return getattr(self.solver, "atol", None)

    def cost(self, d: int, dtype: Any, exponent: float) -> Cost:
        """That of the solver, without the products with microbatches."""
        cost = self.solver.cost(d, dtype, exponent)
        return cost._replace(method=f"{cost.method}, corrected for noise")

    def __call__(
        self, factor: Array, exponent: float, state: Any, samples: Array | None = None
    ) -> tuple[Array, Array, Any]:
        """See `Solver`; without samples nothing is corrected."""
        return self.solver(factor, exponent, state, samples)
