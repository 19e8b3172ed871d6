"""Static layout: which piece of which parameter is which block of which stack.

A plan is a pure function of parameter shapes and options. It is derived at trace time wherever it
is needed and never stored in a state.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from shampoo_jax.base.precision import check_real
from shampoo_jax.blocks.dimension_numbers import (
    DimensionNumbers,
    DimensionOption,
    resolve_dimension_numbers,
)
from shampoo_jax.blocks.exponents import Exponents


@dataclasses.dataclass(frozen=True)
class Cell:
    """One block of every batch slice of a leaf: a box of its merged shape."""

    key: str  # the stack it lives in
    start: tuple[int, ...]
    size: tuple[int, ...]
    transposed: bool  # stored with its two dimensions swapped

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the block in its stack."""
        return self.size[::-1] if self.transposed else self.size


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """How one parameter is cut: permute, reshape to (batch, *merged), slice into cells."""

    name: str
    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    batch: int
    merged: tuple[int, ...]
    cells: tuple[Cell, ...]


def block_key(shape: tuple[int, ...]) -> str:
    """Name of the stack of blocks of this shape, `"3072x768"`; `"scalar"` for 0-D blocks."""
    return "x".join(map(str, shape)) or "scalar"


def merge_dimensions(
    shape: tuple[int, ...], merge: int | None, block_size: int | None
) -> tuple[int, ...]:
    """Multiplies neighbouring dimensions together while the product stays within a block.

    Dimensions of size 1 are dropped; then, from the last to the first, a dimension joins its
    successor if their product is at most `block_size` and at least `merge` dimensions remain.

    Args:
      shape: Parameter shape without batch axes.
      merge: Order below which nothing is merged; None leaves the shape as it is.
      block_size: Largest product of merged dimensions; None for no limit.

    Returns:
      The merged shape: `(64, 3, 7, 7)` with `merge=2, block_size=1024` gives `(64, 147)`.
    """
    if merge is None or 0 in shape:
        return shape
    rest = [d for d in shape if d > 1]
    merged: list[int] = []
    while rest:
        d = rest.pop()
        joined = merged[0] * d if merged else 0
        fits = merged and (block_size is None or joined <= block_size)
        if fits and len(merged) + len(rest) + 1 > merge:
            merged[0] = joined
        else:
            merged.insert(0, d)
    return tuple(merged) or (1,)


def _layout(
    shape: tuple[int, ...],
    numbers: DimensionNumbers | None,
    merge: int | None,
    block_size: int | None,
    name: str,
) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """(permutation, batch, merged shape) of one parameter."""
    if numbers is None:
        return tuple(range(len(shape))), 1, merge_dimensions(shape, merge, block_size)
    axes = [a for group in numbers.dimensions for a in group]
    permutation = (*numbers.batch, *axes)
    if sorted(permutation) != list(range(len(shape))):
        raise ValueError(
            f"dimension_numbers of parameter {name} with shape {shape} name the axes "
            f"{permutation}: name each of its {len(shape)} axes exactly once."
        )
    batch = math.prod(shape[a] for a in numbers.batch)
    merged = tuple(math.prod(shape[a] for a in group) for group in numbers.dimensions)
    return permutation, batch, merged


def _cells(
    merged: tuple[int, ...], block_size: int | None, canonical: bool, exponents: Exponents | None
) -> tuple[Cell, ...]:
    """The boxes of at most block_size per edge that has a factor, first dimension outermost."""
    if 0 in merged:
        return ()
    factored = (True,) * len(merged) if exponents is None else exponents(merged)
    limits = [block_size or d if has else d for d, has in zip(merged, factored, strict=True)]
    edges = [
        [(s, min(limit, d - s)) for s in range(0, d, limit)]
        for d, limit in zip(merged, limits, strict=True)
    ]
    cells = []
    for box in itertools.product(*edges):
        start, size = tuple(s for s, _ in box), tuple(n for _, n in box)
        transposed = canonical and len(size) == 2 and size[0] < size[1]
        cells.append(Cell(block_key(size[::-1] if transposed else size), start, size, transposed))
    return tuple(cells)


def make_plan(
    params: Any,
    *,
    block_size: int | None,
    merge: int | None,
    canonical: bool,
    dimension_numbers: DimensionOption = None,
    exponents: Exponents | None = None,
) -> list[LeafPlan]:
    """Plans every leaf of a tree of arrays or shape structs, in the order of `jax.tree.leaves`.

    Args:
      params: Tree whose leaves have `shape` and `dtype`.
      block_size: Largest edge of a block; None for whole parameters.
      merge: See `merge_dimensions`.
      canonical: Whether 2-D blocks are stored with the longer dimension first, which halves the
        number of distinct shapes.
      dimension_numbers: Rule for leaves that need more than merging, see `blocked`.
      exponents: See `blocked`.

    Returns:
      One `LeafPlan` a leaf.

    Raises:
      ValueError: A complex parameter, or dimension numbers that do not fit its shape.
    """
    rule = resolve_dimension_numbers(dimension_numbers)
    plans = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, shape = jax.tree_util.keystr(path), tuple(np.shape(leaf))
        check_real(path, leaf)
        permutation, batch, merged = _layout(shape, rule(path, leaf), merge, block_size, name)
        cells = _cells(merged, block_size, canonical, exponents) if batch else ()
        plans.append(LeafPlan(name, shape, permutation, batch, merged, cells))
    return plans


def count_blocks(plan: Sequence[LeafPlan]) -> dict[str, int]:
    """Number of blocks of each stack."""
    counts: dict[str, int] = {}
    for leaf in plan:
        for cell in leaf.cells:
            counts[cell.key] = counts.get(cell.key, 0) + leaf.batch
    return counts


def positions(plan: Sequence[LeafPlan]) -> list[list[range]]:
    """By leaf and cell, which blocks of their stack they are."""
    counts: dict[str, int] = {}
    found: list[list[range]] = []
    for leaf in plan:
        found.append([])
        for cell in leaf.cells:
            begin = counts.get(cell.key, 0)
            counts[cell.key] = begin + leaf.batch
            found[-1].append(range(begin, begin + leaf.batch))
    return found


def leading_axes(leaf: LeafPlan) -> list[int | None]:
    """The most significant axis of a leaf in each of its merged dimensions, None where all are 1.

    >>> [leaf] = make_plan(np.ones((4, 3, 7)), block_size=None, merge=2, canonical=False)
    >>> leaf.merged, leading_axes(leaf)
    ((4, 21), [0, 1])
    """
    axes = list(leaf.permutation)
    covered = 1
    while axes and covered < leaf.batch:
        covered *= leaf.shape[axes.pop(0)]
    leading: list[int | None] = []
    for d in leaf.merged:
        size, first = 1, None
        while axes and (size < d or (leaf.shape[axes[0]] == 1 and not leading)):
            axis = axes.pop(0)
            size *= leaf.shape[axis]
            first = axis if first is None and leaf.shape[axis] > 1 else first
        leading.append(first)
    return leading
