"""Minimax polynomials of the matmul-only inverse roots: numpy, float64, computed at trace time.

Each polynomial is the best one for its interval in the uniform norm, found by Remez exchange on a
grid. Compositions are greedy: every step is optimal for the interval that the step before leaves,
which makes the whole optimal (Amsel et al., arXiv:2505.16932, for the sign; Gawlik and Nakatsukasa,
arXiv:1906.11326, for roots).
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Coefficients = tuple[float, ...]

# Largest relative error of the last root step. At 0.07 the images of kept eigenvalues, within
# (1 -+ error)^p, stay apart from the image of the cutoff.
MAX_ERROR = 0.06
# Largest error of the projector's sign outside a gap around the cutoff that the steps determine,
# by p. Half its square times the root of the cutoff is let through, which is most for p = 1.
SIGN_ERRORS = {1: 1e-3}
SIGN_ERROR = 0.01
# Lowest image, relative to that of the cutoff, on which the polish is accurate.
POLISH_FROM = 0.85
# Exponents of the first root step, whose x^4 the bound of A has paid for, and of the others.
FIRST = (0, 1, 2, 4)
OTHERS = (0, 1, 2)
# Images of rounded spectra leave their intervals by no more than this factor.
CUSHION = 1.01
# Image of the cutoff as a part of the largest one: half would separate best, a little less leaves
# room for negative eigenvalues, down to a tenth of the cutoff.
MIDDLE = 0.48
# Arguments of the sign reach this far beyond 1: rounded eigenvalues are a little negative.
SIGN_RANGE = 1.03
GRID = 2000


class Step(NamedTuple):
    """A polynomial `q(x) = sum_k coefficients[k] x^k` and its largest error."""

    coefficients: Coefficients
    error: float


class RootSchedule(NamedTuple):
    """Polynomials for `A^(-1/p)` with the spectrum of A in [0, 1] and a cutoff in it.

    Attributes:
      p: Of the root.
      rtol: The cutoff.
      steps: Of `M <- M q(M)^p`, `Z <- Z q(M)`, quadratics.
      error: Relative error of Z where M was above the interval's lower end.
      images: Image of the cutoff after each step.
      largest: Upper bound of M after the last step.
      signs: Odd quintics `x (a + b x^2 + c x^4)` of the projector; empty for "clip".
      polish: Quadratic that takes the remaining error off; empty for "clip".
    """

    p: int
    rtol: float
    steps: tuple[Coefficients, ...]
    error: float
    images: tuple[float, ...]
    largest: float
    signs: tuple[Coefficients, ...] = ()
    polish: Coefficients = ()


def minimax(lower: float, upper: float, power: float, exponents: tuple[int, ...]) -> Step:
    """Returns the q that minimizes `max |1 - x^power q(x)|` on an interval.

    Args:
      lower: Left end, > 0.
      upper: Right end, > lower.
      power: 1/p for an inverse p-th root; 1 with even exponents for an odd sign polynomial.
      exponents: Of the monomials of q, ascending.

    Returns:
      A `Step`, one coefficient per exponent.

    >>> minimax(0.25, 1.0, 1.0, (0,))  # |1 - c x| on [1/4, 1]: c = 8/5
    Step(coefficients=(1.6,), error=0.6)
    """
    ends = np.sin(np.linspace(0, np.pi / 2, GRID)) ** 2
    low = lower / upper
    grid = np.concatenate([np.geomspace(low, 1, GRID), low + (1 - low) * ends])
    x = np.unique(np.clip(grid, low, 1))
    powers = power + np.array(exponents)
    basis = x[:, None] ** powers
    m = len(exponents) + 1
    signs = (-1.0) ** np.arange(m)
    chebyshev = (1 + np.cos(np.pi * np.arange(m) / (m - 1))) / 2
    reference = np.searchsorted(x, low**chebyshev * (1 - 1e-12))
    best, error = np.zeros(m - 1), np.inf
    for _ in range(50):
        *solution, level = np.linalg.solve(np.column_stack([basis[reference], signs]), np.ones(m))
        residual = 1 - basis @ solution
        if np.abs(residual).max() < error:
            best, error = np.array(solution), float(np.abs(residual).max())
        peaks = _alternating_peaks(residual, m)
        if error <= abs(level) * (1 + 1e-9) or len(peaks) < m:
            break
        reference = peaks
    dense = np.zeros(exponents[-1] + 1)
    dense[list(exponents)] = best / upper**powers
    return Step(tuple(map(float, dense)), error)


def _alternating_peaks(residual: np.ndarray, count: int) -> np.ndarray:
    """Indices of extrema of alternating signs, the largest `count` of them; fewer if rounded."""
    pieces = np.split(np.arange(residual.size), np.flatnonzero(np.diff(np.signbit(residual))) + 1)
    peaks = [piece[np.argmax(np.abs(residual[piece]))] for piece in pieces]
    while len(peaks) > count:
        peaks.pop(0 if abs(residual[peaks[0]]) < abs(residual[peaks[-1]]) else -1)
    return np.array(peaks)


def compose(
    lower: float, upper: float, power: float, p: int, exponents: tuple[tuple[int, ...], ...]
) -> tuple[Step, ...]:
    """Greedy composition of minimax steps.

    Args:
      lower: Left end of the interval, > 0.
      upper: Its right end.
      power: Of `x^power q(x)`, which every step brings near 1.
      p: Of the next argument, `x <- x q(x)^p`.
      exponents: Of q, for each step.
    """
    composed = []
    for each in exponents:
        step = minimax(lower, upper, power, each)
        composed.append(step)
        lower, upper = (1 - step.error) ** p / CUSHION, (1 + step.error) ** p * CUSHION
    return tuple(composed)


def root_steps(lower: float, p: int, count: int) -> tuple[Step, ...]:
    """Steps of an inverse p-th root on [lower, 1]."""
    return compose(lower, 1.0, 1 / p, p, (FIRST, *[OTHERS] * (count - 1)))


def images(x: float, p: int, steps: tuple[Step, ...]) -> tuple[float, ...]:
    """Images of x under `x <- x q(x)^p` after each step."""
    reached = []
    for step in steps:
        x *= float(np.polyval(step.coefficients[::-1], x)) ** p
        reached.append(x)
    return tuple(reached)


@functools.cache
def clip_schedule(p: int, rtol: float) -> RootSchedule:
    """Schedule of `max(x, rtol)^(-1/p)` on [0, 1], with the fewest steps within `MAX_ERROR`.

    The largest value of a composition is the one at 0: the interval is such that it exceeds
    `rtol^(-1/p)` by 5 %.
    """

    def change(steps: tuple[Step, ...]) -> float:
        slope = math.prod(step.coefficients[0] for step in steps) ** p
        return slope * rtol / 1.05**p

    return _fewest(p, rtol, rtol, change)


@functools.cache
def cut_schedule(p: int, rtol: float, sign_steps: int) -> RootSchedule:
    """Schedule of `x^(-1/p)` where `x > rtol`, 0 elsewhere, on [0, 1].

    The composition is built for an interval that begins above the cutoff, so that the cutoff lands
    near the middle of [0, 1], where the map is steep; there the sign
    steps separate the eigenvalues, and the polish corrects those between cutoff and interval.
    """

    def change(steps: tuple[Step, ...]) -> float:
        return images(rtol, p, steps)[-1] / (MIDDLE * _largest(steps[-1].error, p))

    schedule = _fewest(p, rtol, 4 * rtol, change)
    polish = minimax(POLISH_FROM * schedule.images[-1], schedule.largest, 1 / p, (0, 1, 2))
    signs = sign_schedule(sign_steps, SIGN_ERRORS.get(p, SIGN_ERROR))
    return schedule._replace(signs=signs, polish=polish.coefficients)


@functools.cache
def sign_schedule(count: int, error: float = SIGN_ERROR) -> tuple[Coefficients, ...]:
    """Odd quintics whose composition is within `error` of the sign on [-1, 1].

    Except in a gap around 0, the smallest for which that is possible: 0.05 with 3 steps.
    """
    narrow, wide = 1e-6, 0.5
    for _ in range(16):
        gap = (narrow * wide) ** 0.5
        steps = compose(gap, SIGN_RANGE, 1.0, 1, ((0, 2, 4),) * count)
        narrow, wide = (narrow, gap) if steps[-1].error <= error else (gap, wide)
    return tuple(step.coefficients[::2] for step in steps)


@functools.cache
def wide_sign_schedule(gap: float, error: float) -> tuple[Coefficients, ...]:
    """The fewest odd quintics within `error` of the sign on [-1, 1] outside of [-gap, gap]."""
    for count in itertools.count(1):
        steps = compose(gap, SIGN_RANGE, 1.0, 1, ((0, 2, 4),) * count)
        if steps[-1].error <= error:
            return tuple(step.coefficients[::2] for step in steps)
    raise AssertionError("unreachable: more steps always come closer")


def _fewest(
    p: int, rtol: float, lower: float, change: Callable[[tuple[Step, ...]], float]
) -> RootSchedule:
    """The shortest schedule within `MAX_ERROR` on an interval whose left end `change` settles."""
    for count in itertools.count(1):
        left = lower
        for _ in range(10):
            steps = root_steps(left, p, count)
            previous, left = left, min(max(left * change(steps), rtol), 0.9)
            if abs(left / previous - 1) < 0.003:
                break
        error = steps[-1].error
        if error <= MAX_ERROR:
            coefficients = tuple(step.coefficients for step in steps)
            reached, largest = images(rtol, p, steps), _largest(error, p)
            return RootSchedule(p, rtol, coefficients, error, reached, largest)
    raise AssertionError("unreachable: more steps always come closer")


def _largest(error: float, p: int) -> float:
    """Upper bound of M after a step with this error."""
    return (1 + error) ** p * CUSHION
