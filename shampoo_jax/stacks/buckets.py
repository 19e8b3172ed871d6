"""Leaves that are cut and exchanged together, as one array."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from shampoo_jax.blocks.plan import LeafPlan, positions


class Bucket(NamedTuple):
    """Leaves whose merged arrays lie one after the other along the batch axis.

    Attributes:
      members: Which entries of the plan.
      whole: A member's entry, with the batch of all of them.
    """

    members: tuple[int, ...]
    whole: LeafPlan


def make_buckets(
    plan: Sequence[LeafPlan], shared: Callable[[int], Hashable | None]
) -> list[Bucket]:
    """Groups leaves that are cut alike.

    Args:
      plan: From `make_plan`.
      shared: What the i-th leaf must have in common with the others of its bucket; None if it stays
        alone.

    Returns:
      Every leaf in one bucket, in the order of first members.

    >>> import numpy as np
    >>> from shampoo_jax.blocks.plan import make_plan
    >>> params = {"a": np.ones((4, 2)), "b": np.ones(3), "c": np.ones((4, 2))}
    >>> plan = make_plan(params, block_size=None, merge=2, canonical=False)
    >>> [bucket.members for bucket in make_buckets(plan, lambda i: "all")]
    [(0, 2), (1,)]
    """
    groups: dict[Hashable, list[int]] = {}
    for i, leaf in enumerate(plan):
        common = shared(i)
        alike = i if common is None else (leaf.batch, leaf.merged, leaf.cells, common)
        groups.setdefault(alike, []).append(i)
    return [_bucket(members, plan[members[0]]) for members in groups.values()]


def _bucket(members: Sequence[int], leaf: LeafPlan) -> Bucket:
    whole = dataclasses.replace(leaf, batch=len(members) * leaf.batch)
    return Bucket(tuple(members), whole)


def block_order(buckets: Sequence[Bucket], plan: Sequence[LeafPlan]) -> dict[str, list[int]]:
    """By stack the blocks as buckets yield them, each by its place in the order of the plan."""
    places, order = positions(plan), {}
    for members, whole in buckets:
        for k, cell in enumerate(whole.cells):
            order.setdefault(cell.key, []).extend(p for i in members for p in places[i][k])
    return order
