"""Which slot of its stack every block takes, where the stacks are split over owners."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from shampoo_jax.stacks.balance import greedy, makespan

# Waiting of owners for the busiest one beyond which zero blocks are placed and skipped: less is not
# worth computing the blocks of a stack one after the other.
WORTH = 1.1


@dataclasses.dataclass(frozen=True)
class Slots:
    """Slots of stacks that are split into equal runs, one an owner.

    Attributes:
      owners: Number of runs.
      order: By stack the block in each slot, `int[N]`, -1 for a zero block. Blocks keep their
        order, and within a run they come first.
      skips: Whether nothing is computed for zero blocks.
      runs: By stack the run of each owner, `int[owners]`; the i-th has the i-th of other stacks.
    """

    owners: int
    order: dict[str, np.ndarray]
    skips: bool = False
    runs: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def index(self) -> dict[str, np.ndarray]:
        """By stack the position of each slot's block among all blocks, `int32[N]`.

        Zero blocks go on counting from the blocks before them, so that a run has consecutive ones.
        """
        begin, index = 0, {}
        for key, order in self.order.items():
            runs = (order >= 0).reshape(self.owners, -1)
            before = np.cumsum([0, *runs.sum(1)])
            steps = np.arange(runs.shape[1])
            index[key] = (begin + before[:-1, None] + steps).ravel().astype(np.int32)
            begin += int(before[-1])
        return index

    def holds(self, key: str) -> np.ndarray | None:
        """Which slots hold a block, `bool[N]`; None where all do or none is skipped."""
        real = self.order[key] >= 0
        return real if self.skips and not real.all() else None

    def computed(self) -> list[dict[str, int]]:
        """By owner, the slots of each stack that it computes."""
        counts = {
            key: ((order >= 0) | (not self.skips)).reshape(self.owners, -1).sum(1)
            for key, order in self.order.items()
        }
        counts = {key: n[self.runs.get(key, slice(None))] for key, n in counts.items()}
        return [{key: int(n[i]) for key, n in counts.items()} for i in range(self.owners)]

    def spread(self, key: str, values: np.ndarray, fill: int) -> np.ndarray:
        """Values by block `[n]` as values by slot `[N]`."""
        order = self.order[key]
        return np.where(order >= 0, values[order], fill)


def in_turn(counts: Mapping[str, int], owners: int = 1, multiple: int = 1) -> Slots:
    """Blocks one after the other, zero blocks at the end up to a multiple.

    >>> in_turn({"a": 3}, owners=2, multiple=2).order["a"].tolist()
    [0, 1, 2, -1]
    """
    order = {}
    for key, n in counts.items():
        order[key] = np.arange(n + -n % multiple)
        order[key][n:] = -1
    return Slots(owners, order)


def balanced(
    counts: Mapping[str, int],
    costs: Mapping[str, float],
    owners: int,
    runs: Mapping[str, np.ndarray] | None = None,
) -> Slots:
    """Blocks spread over owners so that zero blocks of one stack meet more blocks of another.

    Every owner has equally many slots of each stack. Where it waits less than `WORTH` says for the
    busiest, this is `in_turn`.

    Args:
      counts: Blocks by stack.
      costs: Of one block of each, in any unit.
      owners: Number of owners.
      runs: As in `Slots`.

    Returns:
      The slots, of stacks as long as those of `in_turn`.

    >>> slots = balanced({"a": 1, "b": 3}, {"a": 1.0, "b": 1.0}, 2)
    >>> slots.order["a"].tolist(), slots.order["b"].tolist()
    ([0, -1], [0, -1, 1, 2])
    """
    plain = in_turn(counts, owners, owners)
    lengths = {key: len(order) for key, order in plain.order.items()}
    prices = [costs[key] for key in counts]
    shares = greedy(prices, list(counts.values()), owners, list(lengths.values()))
    equal = sum(costs[key] * n / owners for key, n in lengths.items())
    if equal <= WORTH * makespan(prices, shares):
        return plain
    runs, order = runs or {}, {}
    for (key, n), share in zip(counts.items(), shares, strict=True):
        by_run = np.empty_like(share)
        by_run[runs.get(key, slice(None))] = share
        slots = np.full((owners, lengths[key] // owners), -1)
        slots[np.arange(slots.shape[1]) < by_run[:, None]] = np.arange(n)
        order[key] = slots.ravel()
    return Slots(owners, order, skips=True, runs=runs)
