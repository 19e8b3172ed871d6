"""The matmul-only inverse root as a solver, with eigh for the factors that it fails on."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from shampoo_jax.matrix import eigh, polynomial
from shampoo_jax.matrix.batching import map_selected
from shampoo_jax.solvers import Solver

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Polynomial(Solver):
    """Composed minimax polynomials, see `matrix.polynomial.polynomial_root`.

    A factor whose root fails its checks, for example one with negative eigenvalues beyond rounding,
    is solved by `eigh`, in a loop over such factors that costs nothing where there are none.
    The state counts these fallbacks per factor, int32[N].

    Attributes:
      rtol: Cutoff relative to the largest eigenvalue, static; None means `d * eps` of the dtype.
      semantics: `"cut"`, the pseudo-inverse of `TruncatedEigh`, or the cheaper `"clip"`, which
        raises eigenvalues below the cutoff to it.
      sign_steps: Of the projector of `"cut"`. 3 separate eigenvalues 5 % from the cutoff, 4 those
        1.2 % from it, for 3 more products on top of 27 at size 768.
      precision: Of float32 products; None chooses by the backend that runs them.

    Example:
      >>> factor = jnp.diag(jnp.array([16.0, 0.0]))[None]
      >>> root, ok, fallbacks = Polynomial()(factor, 0.25, jnp.zeros(1, jnp.int32))
      >>> root.round(2).tolist(), ok.tolist(), fallbacks.tolist()
      ([[[0.5, 0.0], [0.0, 0.0]]], [True], [0])
    """

    rtol: Any = None
    semantics: polynomial.Semantics = "cut"
    sign_steps: int = polynomial.SIGN_STEPS
    precision: polynomial.PrecisionPolicy | None = None

    def check(self, exponent: float) -> None:
        """Refuses exponents that are not 1/p."""
        polynomial.integer_root(exponent)

    def init(self, n: int, d: int, dtype: Any) -> Array:
        """No fallbacks so far, int32[n]."""
        del d, dtype
        return jnp.zeros(n, jnp.int32)

    def __call__(self, factor: Array, exponent: float, state: Array) -> tuple[Array, Array, Array]:
        """See `Solver`."""
        root, passed = polynomial.polynomial_root(
            factor,
            exponent,
            semantics=self.semantics,
            rtol=self.rtol,
            sign_steps=self.sign_steps,
            precision=self.precision,
        )
        by_eigh = eigh.truncated_root if self.semantics == "cut" else _clipped_root
        root, ok = map_selected(
            lambda a: by_eigh(a, exponent, rtol=self.rtol),
            ~passed & eigh.finite(factor),
            (root, passed),
            factor,
        )
        return root, ok, state + (ok & ~passed)


def _clipped_root(
    factor: Array, exponent: float, *, rtol: float | None = None
) -> tuple[Array, Array]:
    """`max(A, rtol * largest)^(-exponent)` of one non-zero matrix, and whether it is finite."""
    if rtol is None:
        rtol = factor.shape[-1] * float(jnp.finfo(factor.dtype).eps)
    scale = eigh.power_of_two_scale(factor)
    values, vectors = eigh.eigh(factor / scale)
    powers = jnp.maximum(values, rtol * values.max()) ** -exponent
    root = eigh.reconstruct(powers, vectors) * scale**-exponent
    return root, eigh.finite(root)
