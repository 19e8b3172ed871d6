"""Static plan: which piece of which parameter is which block of which stack.

A plan is a pure function of parameter shapes and options. It is never stored in a state.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from shampoo_jax.base.options import check_real
from shampoo_jax.base.paths import as_written, check_named
from shampoo_jax.blocks.blocking import Blocking
from shampoo_jax.blocks.dimension_numbers import DimensionNumbers, resolve_dimension_numbers
from shampoo_jax.blocks.exponents import Exponents, smaller_side


class Cell(NamedTuple):
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

    @property
    def cut(self) -> tuple[Any, ...]:
        """What leaves have in common that are cut alike."""
        return self.batch, self.merged, self.cells


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the leaves of a tree are cut, in the order of `jax.tree.leaves`.

    Leaves that are cut alike go together: stacks hold blocks by group, then by leaf, cell and batch
    slice, whatever the devices.

    Attributes:
      leaves: One plan a leaf.
      exponents: Of the roots of a block, by the shape it is stored in.
    """

    leaves: tuple[LeafPlan, ...]
    exponents: Exponents

    @functools.cached_property
    def groups(self) -> list[tuple[int, ...]]:
        """Numbers of leaves that are cut alike, in the order of their first ones."""
        found: dict[Any, list[int]] = {}
        for i, leaf in enumerate(self.leaves):
            found.setdefault(leaf.cut, []).append(i)
        return [tuple(members) for members in found.values()]

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of a block by stack, in the order in which blocks fill them."""
        return {c.key: c.stored for g in self.groups for c in self.leaves[g[0]].cells}

    @functools.cached_property
    def powers(self) -> dict[str, tuple[float, ...]]:
        """Exponents by stack."""
        return {key: tuple(self.exponents(shape)) for key, shape in self.shapes.items()}

    @functools.cached_property
    def owners(self) -> dict[str, np.ndarray]:
        """By stack the leaf of each block, `int32[n]`."""
        found: dict[str, list[int]] = {}
        for i in itertools.chain(*self.groups):
            for cell in self.leaves[i].cells:
                found.setdefault(cell.key, []).extend([i] * self.leaves[i].batch)
        return {key: np.array(x, np.int32) for key, x in found.items()}

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """Number of blocks of each stack."""
        return {key: len(x) for key, x in self.owners.items()}


def block_key(shape: tuple[int, ...]) -> str:
    """Name of the stack of blocks of this shape, `"3072x768"`; `"scalar"` for 0-D blocks."""
    return "x".join(map(str, shape)) or "scalar"


def merge_dimensions(
    shape: tuple[int, ...], merge: int | None, size: int | None
) -> tuple[int, ...]:
    """Multiplies neighbouring dimensions together while the product stays within a block.

    Dimensions of size 1 are dropped; then, from the last to the first, a dimension joins its
    successor if their product is at most `size` and at least `merge` dimensions remain.

    Args:
      shape: Parameter shape without batch axes.
      merge: Number of dimensions below which nothing is merged; None leaves the shape as it is.
      size: Largest product of merged dimensions; None for no limit.

    Returns:
      The merged shape: `(64, 3, 7, 7)` with `merge=2, size=1024` gives `(64, 147)`.
    """
    if merge is None or 0 in shape:
        return shape
    rest = [d for d in shape if d > 1]
    merged: list[int] = []
    for before, d in reversed(list(enumerate(rest))):
        fits = merged and (size is None or merged[0] * d <= size)
        if fits and before + 1 + len(merged) > merge:
            merged[0] *= d
        else:
            merged.insert(0, d)
    return tuple(merged) or (1,)


def _read_as(
    shape: tuple[int, ...], numbers: DimensionNumbers | None, blocking: Blocking, name: str
) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """(permutation, batch, merged shape) of one parameter."""
    if numbers is None:
        return tuple(range(len(shape))), 1, merge_dimensions(shape, blocking.merge, blocking.size)
    if not isinstance(numbers, DimensionNumbers):
        raise ValueError(
            f"dimension_numbers gives {numbers!r} for parameter {name}: a DimensionNumbers or None "
            "is needed."
        )
    permutation = (*numbers.batch, *itertools.chain(*numbers.dimensions))
    if sorted(permutation) != list(range(len(shape))):
        raise ValueError(
            f"dimension_numbers of parameter {name} with shape {shape} name the axes "
            f"{permutation}: name each of its {len(shape)} axes exactly once."
        )
    batch = math.prod(shape[a] for a in numbers.batch)
    merged = tuple(math.prod(shape[a] for a in group) for group in numbers.dimensions)
    return permutation, batch, merged


def _cells(
    merged: tuple[int, ...], blocking: Blocking, canonical: bool, exponents: Exponents
) -> tuple[Cell, ...]:
    """The boxes of at most `size` per edge, first dimension outermost."""
    if 0 in merged:
        return ()
    # One-sided Shampoo on the smaller side has no factor of the others to bound. Dimensions that
    # any other option leaves out are cut all the same, as in Meta's package, unless told not to.
    all_are = blocking.cut_all and exponents is not smaller_side
    size, bounded = blocking.size, merged if all_are else exponents(merged)
    edges, cells = [], []
    for d, is_bounded in zip(merged, bounded, strict=True):
        limit = size if size and is_bounded else d
        edges.append([(s, min(limit, d - s)) for s in range(0, d, limit)])
    for box in itertools.product(*edges):
        start, edge = tuple(s for s, _ in box), tuple(n for _, n in box)
        transposed = canonical and len(edge) == 2 and edge[0] < edge[1]
        cells.append(Cell(block_key(edge[::-1] if transposed else edge), start, edge, transposed))
    return tuple(cells)


def make_plan(params: Any, blocking: Blocking, exponents: Exponents) -> Plan:
    """Plans every leaf of a tree of arrays or shape structs.

    Args:
      params: Tree whose leaves have `shape` and `dtype`.
      blocking: How parameters are cut.
      exponents: Of the roots of a block.

    Returns:
      The plan.

    Raises:
      ValueError: A complex parameter, one without a name, or dimension numbers that do not fit its
        shape.
    """
    check_named(params)
    rule = resolve_dimension_numbers(blocking.dimension_numbers)
    # A block and its transpose can share a stack if their exponents are transposed as well.
    canonical = blocking.canonical and exponents((3, 2)) == exponents((2, 3))[::-1]
    plans = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        check_real(path, leaf)
        name, shape = jax.tree_util.keystr(path), tuple(np.shape(leaf))
        permutation, batch, merged = _read_as(shape, rule(as_written(path), leaf), blocking, name)
        cells = _cells(merged, blocking, canonical, exponents) if batch else ()
        plans.append(LeafPlan(name, shape, permutation, batch, merged, cells))
    return Plan(tuple(plans), exponents)


def leading_axes(leaf: LeafPlan) -> list[int | None]:
    """The most significant axis of a leaf in each of its merged dimensions, None where all are 1.

    >>> from shampoo_jax.blocks.exponents import default_exponents
    >>> plan = make_plan(np.ones((4, 3, 7)), Blocking(size=None), default_exponents)
    >>> plan.leaves[0].merged, leading_axes(plan.leaves[0])
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
