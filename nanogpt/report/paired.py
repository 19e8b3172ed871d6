"""Differences of runs that share their seeds, so their weights at first and the order of data."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Difference(NamedTuple):
    """A mean over seeds of differences of losses."""

    mean: float
    error: float  # standard error of the mean; nan for one seed
    n: int

    @property
    def told_apart(self) -> bool:
        """Whether it is more than two standard errors.

        >>> Difference(-0.02, 0.005, 8).told_apart, Difference(-0.02, 0.015, 8).told_apart
        (True, False)
        """
        return abs(self.mean) > 2 * self.error


def paired(losses: Mapping[int, float], others: Mapping[int, float]) -> Difference:
    """Mean of `losses - others` over the seeds that both have, with its standard error.

    Args:
        losses: of one optimizer, by seed.
        others: of another one.

    Returns:
        The difference; nan where no seed is common.

    >>> found = paired({0: 3.0, 1: 2.0, 2: 9.0}, {0: 2.0, 1: 2.0})
    >>> found.mean, found.error, found.n
    (0.5, 0.5, 2)
    """
    found = [losses[seed] - others[seed] for seed in losses.keys() & others.keys()]
    n = len(found)
    mean = math.fsum(found) / n if n else math.nan
    variance = math.fsum((x - mean) ** 2 for x in found) / (n - 1) if n > 1 else math.nan
    return Difference(mean, math.sqrt(variance / n) if n else math.nan, n)


def visible(differences: Iterable[Difference], n: int) -> float:
    """Twice the standard error that n seeds leave, by the pooled variance of differences.

    >>> visible([Difference(0.1, 0.01, 4), Difference(0.0, 0.01, 4)], 16)
    0.01
    """
    known = [d for d in differences if d.n > 1]
    freedom = sum(d.n - 1 for d in known)
    pooled = math.fsum((d.n - 1) * d.n * d.error**2 for d in known)
    return 2 * math.sqrt(pooled / freedom / n) if freedom else math.nan
