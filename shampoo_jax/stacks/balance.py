"""Which owner gets how many blocks of which stack, so that the busiest has little more than others.

Longest processing time first (Graham 1969, Bounds on multiprocessing timing anomalies): at most 4/3
of the best possible where slots do not bind.
"""

import heapq
from collections.abc import Sequence

import numpy as np


def greedy(
    costs: Sequence[float], counts: Sequence[int], owners: int, slots: Sequence[int]
) -> np.ndarray:
    """Gives each block, the dearest first, to the owner with the least work that has a slot left.

    Args:
      costs: Of one block of each stack, in any unit.
      counts: Blocks of each stack.
      owners: Number of owners.
      slots: Of each stack, over all owners, who have equally many.

    Returns:
      Blocks of each stack at each owner, `int[stacks, owners]`; of equal owners the first gets one
      more.

    >>> greedy([8.0, 1.0], [3, 2], 4, [4, 4]).tolist()
    [[1, 1, 1, 0], [1, 0, 0, 1]]
    """
    shares = np.zeros((len(costs), owners), int)
    loads = [(0.0, owner) for owner in range(owners)]
    for k in sorted(range(len(costs)), key=lambda k: -costs[k]):
        full: list[tuple[float, int]] = []
        heapq.heapify(loads)
        for _ in range(counts[k]):
            load, owner = heapq.heappop(loads)
            shares[k, owner] += 1
            open_ = shares[k, owner] < slots[k] // owners
            heapq.heappush(loads if open_ else full, (load + costs[k], owner))
        loads += full
    return shares


def makespan(costs: Sequence[float], shares: np.ndarray) -> float:
    """Work of the busiest owner, in the unit of `costs`.

    >>> makespan([8.0, 1.0], np.array([[1, 1, 1, 0], [1, 0, 0, 1]]))
    9.0
    """
    return float((np.asarray(costs) @ shares).max(initial=0.0))
