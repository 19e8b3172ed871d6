"""Inverse roots by coupled Newton iterations: matrix products only, no decomposition.

Both solvers follow two matrices: `root`, which tends to `A^(-1/p)`, and `coupled`, which stands for
`A root^p` and tends to the identity, so its distance from it is a residual that costs nothing.

A factor is first divided by the power of two of its largest entry: exact, invisible in the result,
and it keeps norms and traces of very large or very small factors inside the range of the dtype.

Derivatives, forward and reverse, are those of the exact root: one eigendecomposition, no loop.
"""

import functools
import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from shampoo_jax.base.hyperparameters import check_static
from shampoo_jax.base.options import POSITIVE, check_entries
from shampoo_jax.matrix.eigh import finite, known_root, power_of_two_scale
from shampoo_jax.matrix.products import matmul, matrix_power

# Above this |A X^p - I|_max a root counts as failed.
MAX_RESIDUAL = 0.1
# The higher-order iteration stops early once the error grows by this factor ...
GROWTH = 1.2
# ... or stands still below this value.
STALLED = 1e-3
# Roots p/q are looked for with p up to this; the cost and the rounding of a root grow with p.
MAX_ROOT = 64


class RootResult(NamedTuple):
    """What an iterative solver returns, per matrix.

    Attributes:
      root: f[..., n, n], `A^(-e)`, dtype of the factor. Meaningless where not `ok`.
      ok: bool[...], whether the root is finite and passed the solver's check.
      iterations: int32[...], number of iterations done.
    """

    root: jax.Array
    ok: jax.Array
    iterations: jax.Array


def rational_root(exponent: float) -> Fraction:
    """Returns the root p/q = 1 / exponent with p <= 64, recognizing rounded fractions.

    `Fraction(1 / 0.75)` taken literally has a denominator near 2^52, because 4/3 is not a binary
    fraction; here 1/3, 1/6, 0.4 and 0.75 give 3, 6, 5/2 and 4/3.

    Args:
      exponent: Positive float, the e of `A^(-e)`.

    Raises:
      ValueError: If no such fraction equals the exponent to rounding.

    >>> rational_root(0.75), rational_root(1 / 6)
    (Fraction(4, 3), Fraction(6, 1))
    """
    check_static({"exponent": exponent})
    POSITIVE("exponent", exponent)
    fraction = Fraction(float(exponent)).limit_denominator(MAX_ROOT)
    if fraction and math.isclose(fraction, exponent, rel_tol=1e-12):
        return 1 / fraction
    raise ValueError(
        f"exponent={exponent} is not 1/p or q/p with p <= {MAX_ROOT}, which coupled iterations "
        "need: take an eigenvalue solver for this exponent."
    )


def coupled_newton(
    factor: jax.Array,
    root: int,
    damping: ArrayLike,
    *,
    max_iterations: int = 100,
    tolerance: ArrayLike = 1e-6,
    max_residual: ArrayLike = MAX_RESIDUAL,
) -> RootResult:
    """Returns `(A + damping I)^(-1/p)` by the coupled Newton iteration.

    With `z = (p + 1) / (2 |A|_F)`, `X_0 = z^(1/p) I` and `M_0 = z A`, repeats

        T = (1 + 1/p) I - M / p,    X <- X T,    M <- T^p M

    while `max |M - I| > tolerance`. Each matrix of a stack stops on its own. A factor that is
    exactly zero, `damping` included, has the root zero and is `ok`.

    Args:
      factor: f32 or f64[..., n, n], symmetric positive semi-definite.
      root: Static integer p >= 1.
      damping: Added to the diagonal, in the units of the factor. Scalar, or one value per matrix.
      max_iterations: Static. Reaching it is not a failure by itself.
      tolerance: Of `max |M - I|`. Float32 may never reach 1e-6 and then does all iterations.
      max_residual: `ok` needs the last `max |M - I|` to be at most this. Meta's package accepts
        every finite root: `math.inf`.

    Returns:
      A `RootResult` with the dtype of the factor.

    Raises:
      ValueError: If `root` is not a positive integer, or `factor` is not a stack of squares.

    Source: Anil et al., arXiv:2002.09018; Shi et al., arXiv:2309.06497.

    >>> result = coupled_newton(jnp.diag(jnp.array([1.0, 16.0])), 4, 0.0)
    >>> [round(float(entry), 4) for entry in jnp.diag(result.root)], bool(result.ok)
    ([1.0, 0.5], True)
    """
    POSITIVE.but("2 is the square root")("root", root)
    check_entries(
        {
            "damping": damping,
            "max_iterations": max_iterations,
            "tolerance": tolerance,
            "max_residual": max_residual,
        }
    )
    if Fraction(root).denominator != 1 or root < 1:
        raise ValueError(
            f"root={root} must be a positive integer for the coupled Newton iteration: use "
            "coupled_higher_order or an eigenvalue solver for other exponents."
        )
    p = int(root)

    def solve(factor, damping, tolerance, max_residual):
        matrix, scale = _scaled(factor, damping)
        start = _start(matrix, (p + 1) / (2 * jnp.linalg.norm(matrix)), p)
        update = functools.partial(_newton_factor, p=p)
        root, error, step = _iterate(matrix, update, start, p, tolerance, max_iterations)
        return *_finish(root, matrix, scale, Fraction(p), error <= max_residual), step

    return _solve_each(solve, factor, damping, tolerance, max_residual)


def coupled_higher_order(
    factor: jax.Array,
    exponent: float,
    relative_damping: ArrayLike,
    absolute_damping: ArrayLike,
    *,
    max_iterations: int = 100,
    tolerance: ArrayLike = 1e-8,
    order: int = 3,
) -> RootResult:
    """Returns `(A + d I)^(-e)` by a coupled iteration of any order, for rational e.

    `d = max(relative_damping * |A|_inf, absolute_damping)` and p/q = 1/e. With
    `X_0 = tr(A)^(-1/p) I` and `M_0 = A / tr(A)`, one Newton step (see `coupled_newton`) guarantees
    convergence; then repeats

        T = sum_(i < order) b_i (I - M)^i,  b_i = prod_(j = 1..i) (1 + (j-1) p) / (j p),
        X <- X T,    M <- T^p M

    until `max |M - I| <= tolerance`, or until that error grows by more than 1.2 times or stands
    still below 1e-3; the result is `X^q`. `ok` needs `max |A X^p - I| <= 0.1` and a finite result.
    A factor that is exactly zero has the root zero and is `ok`.

    Meta's package builds p/q from the binary value of 1/e, and raises for e = 0.75 and alike (see
    `rational_root`); those are correct here. To compare with its exceptions, test
    `Fraction(1 / e).numerator > 64`.

    Args:
      factor: f32 or f64[..., n, n], symmetric positive semi-definite.
      exponent: Static e > 0; q/p with p <= 64 up to rounding.
      relative_damping: Damping relative to the largest absolute row sum. Scalar or one per matrix.
      absolute_damping: Least damping, in the units of the factor. Scalar or one per matrix.
      max_iterations: Static; the Newton step is not counted against it.
      tolerance: Of `max |M - I|`.
      order: Static integer >= 2; 2 is Newton's iteration.

    Returns:
      A `RootResult` with the dtype of the factor.

    Raises:
      ValueError: If the exponent is not such a fraction, the order is below 2, or `factor` is not
        a stack of squares.

    Source: Lakic, On the computation of the matrix k-th root, 1998; Shi et al., arXiv:2309.06497.

    >>> result = coupled_higher_order(jnp.diag(jnp.array([1.0, 16.0])), 0.75, 0.0, 0.0)
    >>> [round(float(entry), 4) for entry in jnp.diag(result.root)], bool(result.ok)
    ([1.0, 0.125], True)
    """
    check_entries(
        {
            "relative_damping": relative_damping,
            "absolute_damping": absolute_damping,
            "max_iterations": max_iterations,
            "tolerance": tolerance,
            "order": order,
        }
    )
    ratio = rational_root(exponent)
    p, q = ratio.numerator, ratio.denominator
    update = functools.partial(_series_factor, coefficients=_series(p, order))

    def solve(factor, relative, absolute, tolerance):
        matrix, scale = _scaled(factor, 0)
        row_sum = scale * jnp.linalg.norm(matrix, ord=jnp.inf)
        matrix, scale = _scaled(factor, jnp.maximum(relative * row_sum, absolute))
        root, coupled, _ = _start(matrix, 1 / jnp.trace(matrix), p)
        start = _apply(_newton_factor(coupled, p), root, coupled, p)
        ends = tolerance, max_iterations, GROWTH, STALLED
        root, _, step = _iterate(matrix, update, start, p, *ends)
        accurate = _distance(matmul(matrix, matrix_power(root, p))) <= MAX_RESIDUAL
        return *_finish(matrix_power(root, q), matrix, scale, ratio, accurate), step

    return _solve_each(solve, factor, relative_damping, absolute_damping, tolerance)


def _solve_each(solve, factor: jax.Array, *scalars: ArrayLike) -> RootResult:
    """Maps a solver of one matrix over the stack; a batched while_loop freezes finished ones."""
    if factor.ndim < 2 or factor.shape[-1] != factor.shape[-2]:
        raise ValueError(f"factor has shape {factor.shape}; expected (..., n, n).")
    scalars = tuple(jnp.asarray(scalar, factor.dtype) for scalar in scalars)
    signature = ",".join(["(n,n)"] + ["()"] * len(scalars)) + "->(n,n),(),()"
    return RootResult(*jnp.vectorize(solve, signature=signature)(factor, *scalars))


def _iterate(
    matrix, update, start, p: int, tolerance, max_iterations: int, growth=math.inf, stalled=0.0
):
    """Returns root, error and number of steps of `X <- X T, M <- T^p M` with T = `update(M)`.

    A loop of unknown length has no reverse mode: the root's derivative is that of `matrix^(-1/p)`.

    Ends at the tolerance or the last step, where the error grows by more than `growth`, or where it
    stands still below `stalled`.
    """

    def proceed(state):
        _, _, error, step, stop = state
        return ~stop & (error > tolerance) & (step < max_iterations)

    def iterate(state):
        root, coupled, error, step, _ = state
        root, coupled, new = _apply(update(coupled), root, coupled, p)
        stop = (new > growth * error) | ((new == error) & (error < stalled))
        return root, coupled, new, step + 1, stop

    start, tolerance = jax.lax.stop_gradient((start, tolerance))
    # zeros_like carries the sharding type of its argument, which shard_map demands of loop state.
    error = start[-1]
    state = (*start, jnp.zeros_like(error, jnp.int32), jnp.zeros_like(error, bool))
    root, _, error, step, _ = jax.lax.while_loop(proceed, iterate, state)
    return known_root(1 / p, matrix, root), error, step


def _scaled(matrix, damping):
    """Returns `(A + damping I) / scale` and the scale, a scalar power of two."""
    matrix = matrix + damping * _eye(matrix)
    scale = power_of_two_scale(matrix)
    return matrix / scale, scale[0, 0]


def _start(matrix, z, p: int):
    """Returns the first root, coupled matrix and error."""
    coupled = z * matrix
    return z ** (1 / p) * _eye(matrix), coupled, _distance(coupled)


def _newton_factor(coupled, p: int):
    return (1 + 1 / p) * _eye(coupled) - coupled / p


def _series_factor(coupled, coefficients: list[float]):
    """The series at M, by Horner's rule."""
    eye = _eye(coupled)
    update = coefficients[-1] * eye
    for coefficient in reversed(coefficients[:-1]):
        update = matmul(update, eye - coupled) + coefficient * eye
    return update


def _apply(update, root, coupled, p: int):
    """Returns the next root, coupled matrix and error."""
    coupled = matmul(matrix_power(update, p), coupled)
    return matmul(root, update), coupled, _distance(coupled)


def _distance(coupled):
    return jnp.max(jnp.abs(coupled - _eye(coupled)))


def _eye(matrix):
    return jnp.eye(matrix.shape[-1], dtype=matrix.dtype)


def _series(p: int, order: int) -> list[float]:
    """Coefficients of the binomial series of (1 - x)^(-1/p)."""
    series = [1.0]
    for j in range(1, order):
        series.append(series[-1] * (1 + (j - 1) * p) / (j * p))
    return series


def _finish(root, matrix, scale, ratio: Fraction, accurate):
    """Undoes the scaling; returns the root, zero for the zero matrix, and its status."""
    root = root * scale ** (-1 / float(ratio))
    zero = jnp.all(matrix == 0)
    return jnp.where(zero, 0, root), zero | (accurate & finite(root))
