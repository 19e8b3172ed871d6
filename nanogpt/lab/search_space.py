"""Points of a search: which values of which settings a sweep tries."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Point = dict[str, str]  # a value, as on the command line, for each dotted name


class Range(NamedTuple):
    """Numbers to draw from, uniformly or, with `log`, uniformly in their logarithm."""

    low: float
    high: float
    log: bool


def parse_list(text: str) -> tuple[str, tuple[str, ...]]:
    """Reads NAME=A,B,...

    Raises:
        ValueError: anything else, or a value twice.

    >>> parse_list("matrices.learning_rate=0.01,0.02")
    ('matrices.learning_rate', ('0.01', '0.02'))
    """
    name, _, values = text.partition("=")
    found = tuple(values.split(","))
    if not name or not all(found) or len(set(found)) < len(found):
        raise ValueError(f"--grid {text}: must be NAME=A,B,... with different values.")
    return name, found


def parse_range(text: str) -> tuple[str, Range]:
    """Reads NAME=log:LOW:HIGH or NAME=lin:LOW:HIGH.

    Raises:
        ValueError: anything else, LOW not below HIGH, or a logarithm of what is not positive.

    >>> parse_range("matrices.learning_rate=log:1e-3:1e-1")
    ('matrices.learning_rate', Range(low=0.001, high=0.1, log=True))
    """
    name, _, values = text.partition("=")
    scale, _, ends = values.partition(":")
    try:
        low, high = (float(end) for end in ends.split(":"))
    except ValueError:
        low = high = math.nan
    above = 0.0 if scale == "log" else -math.inf
    if not name or scale not in ("log", "lin") or not above < low < high < math.inf:
        raise ValueError(
            f"--random {text}: must be NAME=log:LOW:HIGH or NAME=lin:LOW:HIGH with LOW < HIGH, "
            "above 0 for log."
        )
    return name, Range(low, high, scale == "log")


def points(
    lists: Mapping[str, Sequence[str]],
    ranges: Mapping[str, Range] | None = None,
    runs: int | None = None,
    seed: int = 0,
) -> list[Point]:
    """Chooses the points of a search.

    A larger `runs` only adds points, so a search can be widened and keeps what it has.

    Args:
        lists: Values of each setting; every combination is a point.
        ranges: Settings drawn at random; the combinations take turns, so each gets as many draws.
        runs: Number of points. Without ranges, at most so many, a random choice of the combinations
            if there are more; None: all of them.
        seed: Of the random numbers.

    Returns:
        One {name: value} a point.

    Raises:
        ValueError: ranges without `runs`, or `runs` below 1.

    Example:
        >>> points({"a": "12", "b": "3"})
        [{'a': '1', 'b': '3'}, {'a': '2', 'b': '3'}]
    """
    if runs is not None and runs < 1:
        raise ValueError(f"runs={runs}: must be at least 1.")
    combinations = [
        dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())
    ]
    random = np.random.default_rng(seed)
    if not ranges:
        order = random.permutation(len(combinations))[:runs]
        return [combinations[index] for index in sorted(order)]
    if runs is None:
        raise ValueError("runs=None: say by --runs how many points to draw.")
    return [
        combinations[index % len(combinations)]
        | {name: _draw(random, range_) for name, range_ in ranges.items()}
        for index in range(runs)
    ]


def _draw(random: np.random.Generator, range_: Range) -> str:
    """A number of four digits, which is enough and can be read."""
    low, high, log = range_
    value = math.exp(random.uniform(math.log(low), math.log(high))) if log else 0.0
    return f"{value if log else random.uniform(low, high):.4g}"
