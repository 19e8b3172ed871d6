"""What a comparison with recorded data gives."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Measurement(NamedTuple):
    """One comparison: it holds if `error <= tolerance`."""

    golden: str  # recorded file, and the case in it
    what: str  # compared quantity, and how its error is taken
    error: float
    tolerance: float
    spread: float | None = None  # how far the script itself moves under rounding, if recorded


def misses(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Those that do not hold; an error that is not a number does not.

    Args:
        measurements: At least one.

    Raises:
        ValueError: There is none, so that nothing was compared.

    Example:
        >>> misses([Measurement("a", "x", 0.5, 1.0), Measurement("b", "x", float("nan"), 1.0)])
        [Measurement(golden='b', what='x', error=nan, tolerance=1.0, spread=None)]
    """
    measurements = list(measurements)
    if not measurements:
        raise ValueError("measurements is empty: nothing was compared.")
    return [m for m in measurements if not m.error <= m.tolerance]


def largest(actual: jax.typing.ArrayLike, expected: np.ndarray) -> float:
    """The largest absolute difference; infinite where one side alone is not a number.

    Example:
        >>> largest([1.0, 2.0], np.array([1.0, 2.5]))
        0.5
    """
    error = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    return float(np.nan_to_num(error, nan=np.inf).max(initial=0.0))


def ulps(actual: jax.typing.ArrayLike, expected: np.ndarray) -> tuple[float, float]:
    """Compares values of bfloat16 by their bits.

    Args:
        actual: Array of bfloat16 values, in any float dtype.
        expected: Such an array of the same shape.

    Returns:
        The fraction of entries that differ, and the largest distance in units in the last place.

    Example:
        >>> ulps([1.0, 1.0, 1.0, 1.0078125], np.ones(4))
        (0.25, 1.0)
    """
    narrow = (np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in (actual, expected))
    bits = [x.view(np.int16).astype(int) for x in narrow]
    off = np.abs(bits[0] - bits[1])
    return float((off > 0).mean()), float(off.max(initial=0))
