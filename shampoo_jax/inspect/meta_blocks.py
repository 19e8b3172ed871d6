"""Which block of Meta's is which block of ours."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from shampoo_jax.blocks.blocking import Blocking
from shampoo_jax.blocks.exponents import Exponents
from shampoo_jax.blocks.plan import LeafPlan, make_plan
from shampoo_jax.inspect.meta_archive import CORRECTED, OF_BLOCKS, Arrays, MetaParameter
from shampoo_jax.stacks.blocked import fingerprints

Shape = tuple[int, ...]


class Slot(NamedTuple):
    """A block of ours, and where theirs is."""

    stack: str
    row: int  # among those of its parameter in the stack
    block: int  # their number
    turned: bool  # stored with its two dimensions swapped


class Match(NamedTuple):
    """The blocks of one parameter.

    Attributes:
      slots: One a block.
      stored: Shape of a block by our stack.
      theirs: How they cut the parameter.
    """

    slots: list[Slot]
    stored: dict[str, Shape]
    theirs: LeafPlan


def match_blocks(
    name: str, one: MetaParameter, shape: Shape, transposed: bool, layout: int, exponents: Exponents
) -> Match:
    """Finds out how they cut a parameter, and whether we cut it alike.

    Both merge and cut by the same rule, so size and number of their blocks tell their options.

    Args:
      name: Of the parameter, for messages.
      one: Their state of it.
      shape: Its shape, as they have it.
      transposed: Whether ours is its transpose.
      layout: Checksum of how our optimizer cuts it.
      exponents: Of our roots; they decide whether a block may be stored transposed.

    Raises:
      ValueError: Blocks of no cut of this shape, or of another one than the optimizer's.
    """
    sizes = [block_shape(block) for block in one.blocks]
    limit = max(sizes[0], default=1) if sizes else 1
    cuts = ((b, plan) for b, plan, _ in _cuts(shape, limit, exponents) if not b.canonical)
    found = next((x for x in cuts if [c.size for c in x[1].cells] == sizes), None)
    words = ", ".join(f"{n} of {'x'.join(map(str, s))}" for s, n in Counter(sizes).items())
    if found is None:
        raise ValueError(
            f"state/{one.name} has blocks {words or 'of no shape'}, into which a parameter of "
            f"shape {shape} is not cut: match {name} with its own state by names, and name it in "
            "transposed if it is the transpose of theirs."
        )
    blocking, theirs = found
    if transposed and len(theirs.merged) != 2:
        raise ValueError(
            f"state/{one.name} is that of shape {theirs.merged}: the state of a vector or of more "
            f"dimensions cannot be transposed for {name}; keep the parameter as they have it."
        )
    ours = _cuts(shape[::-1] if transposed else shape, limit, exponents)
    plan = next((plan for _, plan, checksum in ours if checksum == layout), None)
    back = -1 if transposed else 1
    numbers = {(c.start, c.size): i for i, c in enumerate(theirs.cells)}
    boxes = [(c.start[::back], c.size[::back]) for c in plan.cells] if plan else []
    if plan is None or not numbers.keys() >= set(boxes):
        raise ValueError(
            f"state/{one.name} has blocks {words}, the optimizer cuts {name} otherwise: build it "
            f"with blocking=Blocking(size={blocking.size}, merge={blocking.merge}, "
            "canonical=False, dimension_numbers=None), where a size that cuts the same will do."
        )
    rows: Counter[str] = Counter()
    slots = []
    for cell, box in zip(plan.cells, boxes, strict=True):
        slots.append(Slot(cell.key, rows[cell.key], numbers[box], cell.transposed != transposed))
        rows[cell.key] += 1
    return Match(slots, {c.key: c.stored for c in plan.cells}, theirs)


def _cuts(
    shape: Shape, size: int, exponents: Exponents
) -> Iterator[tuple[Blocking, LeafPlan, int]]:
    """All ways to cut a shape into blocks of at most this size, with their checksums."""
    merges = (None, *range(1, max(len(shape), 1) + 1))
    for merge, canonical in itertools.product(merges, (False, True)):
        blocking = Blocking(size, merge, canonical=canonical, dimension_numbers=None)
        plan = make_plan(jax.ShapeDtypeStruct(shape, jnp.float32), blocking, exponents)
        yield blocking, plan.leaves[0], int(fingerprints(plan)[0, 3])


def block_shape(block: Arrays) -> Shape:
    """Shape of one of their blocks, told from an array of it, or from all its factors."""
    for field in (*OF_BLOCKS, CORRECTED):
        if field in block:
            return block[field].shape
    factors = (key for key in sorted(block, key=len) if key.startswith("factor_matrices/"))
    return tuple(edge(block[key].shape) for key in factors)


def edge(shape: Shape) -> int:
    """`d` of a matrix `[d, d]` or of its packed triangle `[d(d+1)/2]`."""
    return (math.isqrt(8 * shape[0] + 1) - 1) // 2 if len(shape) == 1 else shape[0]
