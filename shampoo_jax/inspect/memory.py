"""Temporary memory of a step, estimated from the sizes of blocks and factors."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from shampoo_jax.blocks.plan import Plan


class Arrays(NamedTuple):
    """Temporary arrays beside the stack of gradients, in arrays of the size of a block or a factor.

    Attributes:
      block: Of the size of blocks.
      factor: Of the size of each dimension's factors.
      largest: Of the size of the factors of the largest dimension.
    """

    block: float
    factor: float
    largest: float


# As XLA assigns buffers on CPU, read from `memory_analysis` of square and of long blocks. In a
# chunk, slices of the state are temporary as well; in a stack of its own, state is written in
# place. A fraction is a mask of one byte an entry.
WHOLE = {
    "roots": Arrays(0, 1, 0.5),  # of factors that `lapack` takes; up to 64 it is twice that
    "bases": Arrays(2, 2, 3),
    "kl": Arrays(3.25, 3, 2),
    "kl_scaled": Arrays(2, 3, 2),
}
CHUNK = {
    "roots": Arrays(3, 4, 1),
    "bases": Arrays(6, 4, 3),
    "kl": Arrays(7.25, 5, 2),
    "kl_scaled": Arrays(5, 5, 2),
}
GRAFT = {"whole": 1, "chunk": 2}  # more arrays of the size of blocks


def temporary_bytes(
    plan: Plan, chunks: Mapping[str, tuple[int, int]], kind: str, grafted: bool
) -> int:
    """Estimate of `memory_analysis().temp_size_in_bytes` of a donated step in float32.

    Stacks of gradients are there at the same time; those that are computed in chunks become
    updates, of which one stack at a time is copied for its leaves. Chunks use the same memory one
    after the other; stacks computed as a whole do not.

    Args:
      plan: Stacks and their blocks.
      chunks: By stack its blocks on a device, and how many of them are computed at a time.
      kind: What the direction keeps, a key of `WHOLE`.
      grafted: Whether a magnitude is computed beside it.
    """
    gradients, whole, roots, loops = 0.0, 0.0, [0.0], [0.0]
    for key, shape in plan.shapes.items():
        n, size = chunks[key]
        block = math.prod(shape)
        factors = [d * d for d, e in zip(shape, plan.powers[key], strict=True) if e]
        gradients += n * block
        arrays, more = (WHOLE, "whole") if size == n else (CHUNK, "chunk")
        a = arrays[kind]
        own = (a.block + grafted * GRAFT[more]) * block + a.factor * sum(factors)
        largest = a.largest * max(factors, default=0)
        if size < n:
            loops += [size * (own + largest), n * block]
        elif kind == "roots":  # one computation after the other
            whole += n * own
            roots.append(n * largest)
        else:
            whole += n * (own + largest)
    working = max(whole + max(roots), *loops)
    return round(4 * (gradients + working))
