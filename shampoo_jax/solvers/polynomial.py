"""The matmul-only inverse root as a solver, with another way for factors that it fails on."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from shampoo_jax.base.options import Checked
from shampoo_jax.matrix import eigh, polynomial
from shampoo_jax.matrix.batching import map_selected
from shampoo_jax.solvers.eigh import TruncatedEigh
from shampoo_jax.solvers.solver import PRODUCT, Cost, Solver

Array = jax.Array
Solved = tuple[Array, Array, Array]  # roots, which can be used, which the polynomials alone solved

EIGH_UP_TO = 128  # edge of the factors that `Auto` leaves to eigh on every backend


class CountsFallbacks(Checked, Solver):
    """A solver whose state is the number of roots so far that polynomials left to eigh."""

    def init(self, n: int, d: int, dtype: Any) -> Array:
        """No fallbacks so far, int32[n]."""
        return jnp.zeros(n, jnp.int32)

    def figures(self, state: Array) -> dict[str, Array]:
        """The fallbacks."""
        return {"fallbacks": state}


@dataclasses.dataclass(frozen=True)
class Polynomial(CountsFallbacks):
    """Composed minimax polynomials, see `matrix.polynomial.polynomial_root`.

    A factor whose root fails its checks, for example one with negative eigenvalues beyond rounding,
    is solved by `eigh`, in a loop over such factors that costs nothing where there are none. On a
    TPU, whose compiler takes minutes for each size of `eigh`, polynomials project such factors onto
    their positive eigenvalues, and the stack is solved again; what fails then keeps its old root.
    The state counts these fallbacks per factor, int32[N].

    Float32 roots are less accurate than those of eigh, more so for small factors, whose cutoff is
    lower: applied to gradients of low rank they are wrong by 1 % at d = 6 to 16 and by 0.5 % at 64
    to 128; rounding, and so the scale of the gradients, decides part of that.

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

    @property
    def swift(self) -> bool:
        """With the default cutoff."""
        return self.rtol is None

    def __post_init__(self) -> None:
        """Raises ValueError for what is no policy, or one of something else, and as `Checked`."""
        super().__post_init__()
        polynomial.check_precision(self.precision)

    def check(self, exponent: float) -> None:
        """Refuses exponents that are not 1/p."""
        polynomial.integer_root(exponent)

    def __call__(self, factor: Array, exponent: float, state: Array) -> tuple[Array, Array, Array]:
        """See `Solver`."""
        given, factor = factor, jax.lax.stop_gradient(factor)
        or_eigh, or_again = (
            functools.partial(way, exponent=exponent) for way in (self._or_eigh, self._or_again)
        )
        cpu, gpu = (functools.partial(or_eigh, backend=backend) for backend in ("cpu", "gpu"))
        root, ok, passed = jax.lax.platform_dependent(factor, cpu=cpu, tpu=or_again, default=gpu)
        return eigh.known_root(exponent, given, root), ok, state + (ok & ~passed)

    def _or_eigh(self, factor: Array, exponent: float, backend: str) -> Solved:
        """Roots by polynomials, by eigh where they fail."""
        root, passed = polynomial.root_on(backend, factor, exponent, **vars(self))
        by_eigh = eigh.truncated_root if self.semantics == "cut" else eigh.clipped_root
        solve = functools.partial(by_eigh, exponent=exponent, rtol=self.rtol)
        failed = ~passed & eigh.finite(factor)
        return *map_selected(solve, failed, (root, passed), factor), passed

    def _or_again(self, factor: Array, exponent: float) -> Solved:
        """Roots by polynomials, where they fail by the same of the factor's positive part.

        One program in a loop solves both: a TPU's compiler takes minutes for an eigh.
        """
        sound = eigh.finite(factor)
        resolved = eigh.relative_cutoff(self.rtol, factor.shape[-1], factor.dtype) / 10
        positive = functools.partial(polynomial.positive_part, resolved=resolved)

        def goes_on(now: tuple[Array, Solved]) -> Array:
            turn, (_, ok, _) = now
            return (turn < 2) & (sound & ~ok).any()

        def solve(now: tuple[Array, Solved]) -> tuple[Array, Solved]:
            turn, (root, ok, passed) = now
            matrices = jax.lax.cond(turn > 0, positive, lambda x: x, factor)
            new, good = polynomial.root_on("tpu", matrices, exponent, **vars(self))
            root = jnp.where(ok[:, None, None], root, new)
            return turn + 1, (root, ok | good, jnp.where(turn > 0, passed, good))

        none = jnp.zeros_like(sound)
        start = jnp.zeros([], jnp.int32), (jnp.zeros_like(factor), none, none)
        return jax.lax.while_loop(goes_on, solve, start)[1]

    def cost(self, d: int, dtype: Any, exponent: float) -> Cost:
        """The products, counted."""
        options = self.semantics, self.rtol, self.sign_steps
        schedule = polynomial.root_schedule(d, dtype, exponent, *options)
        count = polynomial.count_products(schedule)
        matrices = 6 if self.semantics == "cut" else 5
        return Cost(PRODUCT * count, f"{count} products", matrices, fallback=True)

    def policy(self, d: int, dtype: Any, backend: str) -> polynomial.PrecisionPolicy:
        """Arithmetic of the products for factors `[d, d]` on `"cpu"`, `"gpu"` or `"tpu"`."""
        rtol = eigh.relative_cutoff(self.rtol, d, dtype)
        return polynomial.choose_policy(backend, dtype, rtol, self.precision)


@dataclasses.dataclass(frozen=True)
class Auto(CountsFallbacks):
    """The faster one of `TruncatedEigh` and `Polynomial`, which agree on what is kept.

    The backend that a step is compiled for decides, so that a state can move between backends:

      - CPU: eigh. Measured at d = 768 on one core: 64 ms a root, 335 ms by products.
      - GPU, TPU: products where d > 128. This is an estimate, not a measurement: at d = 768 and
        3072 the 27 products of a root are to take 0.1 and 7 ms of an H100, eigh 9 and 67 ms. Up to
        128 both are short and the time goes into launching kernels, of which products need about
        as many at any size; eigh decides exactly there.
      - Exponents that are not 1/p, and an `rtol` that products cannot resolve: eigh everywhere.

    Attributes:
      rtol: Cutoff relative to the largest eigenvalue; None means `d * eps` of the dtype.

    Example:
      >>> root, ok, _ = Auto()(jnp.diag(jnp.array([16.0, 0.0]))[None], 0.25, jnp.zeros(1, int))
      >>> root.tolist(), ok.tolist()
      ([[[0.5, 0.0], [0.0, 0.0]]], [True])
    """

    rtol: Any = None

    @property
    def swift(self) -> bool:
        """With the default cutoff."""
        return self.rtol is None

    def choice(
        self, factor: Array | jax.ShapeDtypeStruct, exponent: float, backend: str
    ) -> TruncatedEigh | Polynomial:
        """The solver for factors of this shape and dtype on a backend."""
        if backend == "cpu" or factor.shape[-1] <= EIGH_UP_TO:
            return TruncatedEigh(self.rtol)
        try:
            Polynomial(self.rtol).cost(factor.shape[-1], factor.dtype, exponent)
        except ValueError:
            return TruncatedEigh(self.rtol)
        return Polynomial(self.rtol)

    def __call__(self, factor: Array, exponent: float, state: Array) -> tuple[Array, Array, Array]:
        """See `Solver`."""
        here, there = (self.choice(factor, exponent, backend) for backend in ("cpu", "gpu"))
        if here == there:
            return here(factor, exponent, state)
        return jax.lax.platform_dependent(
            factor,
            state,
            cpu=lambda factor, state: here(factor, exponent, state),
            default=lambda factor, state: there(factor, exponent, state),
        )

    def cost(self, d: int, dtype: Any, exponent: float) -> Cost:
        """That of the choice on the default backend."""
        backend, factor = jax.default_backend(), jax.ShapeDtypeStruct((d, d), dtype)
        cost = self.choice(factor, exponent, backend).cost(d, dtype, exponent)
        return cost._replace(method=f"{cost.method} (auto on {backend})")
