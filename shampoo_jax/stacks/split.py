"""Leaves cut into stacks of equal blocks, and put together again."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from shampoo_jax.blocks.plan import Cell, LeafPlan
from shampoo_jax.stacks.buckets import Bucket, block_order, make_buckets
from shampoo_jax.stacks.layout import StackLayout

Array = jax.Array


def split(
    leaves: Sequence[Array], plan: Sequence[LeafPlan], layout: StackLayout | None = None
) -> dict[str, Array]:
    """Cuts arrays into blocks and stacks equal shapes, in the order of leaves, cells and batch.

    Args:
      leaves: One array per entry of `plan`.
      plan: Layout from `make_plan`.
      layout: The way of the blocks to their owners on a mesh, where there is one.

    Returns:
      Stacks `[N, *block]` by block key, in float32 or the leaves' wider dtype.
    """
    leaves = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in leaves]
    dtypes = [x.dtype for x in leaves]
    buckets = buckets_of(plan, dtypes, layout)
    pieces: dict[str, list[Array]] = {}
    wide: dict[str, Any] = {}
    for members, whole in buckets:
        x = _bundle([_merge(leaves[i], plan[i], layout) for i in members], whole, layout)
        dtype = dtypes[members[0]]
        for (cell, _), piece in zip(_cuts(whole, layout), _cut(x, whole, layout), strict=True):
            piece = piece.swapaxes(1, 2) if cell.transposed else piece
            piece = piece if layout is None else layout.piece(piece, cell.key)
            pieces.setdefault(cell.key, []).append(piece)
            wide[cell.key] = jnp.promote_types(dtype, wide.get(cell.key, dtype))
    stacks = {key: jnp.concatenate(parts) for key, parts in pieces.items()}
    if layout is None:
        return stacks
    order = block_order(buckets, plan)
    return {
        key: layout.to_owners(x, key, order[key]).astype(wide[key]) for key, x in stacks.items()
    }


def buckets_of(
    plan: Sequence[LeafPlan], dtypes: Sequence[Any], layout: StackLayout | None
) -> list[Bucket]:
    """Leaves that are exchanged before they are stacked go together; others by themselves."""
    return make_buckets(
        plan, lambda i: None if layout is None else layout.shared(plan[i], dtypes[i])
    )


def _merge(x: Array, leaf: LeafPlan, layout: StackLayout | None) -> Array:
    """A leaf as `(batch, *merged)`."""
    x = x if layout is None else layout.enter(x, leaf)
    x = x.transpose(leaf.permutation)
    return x.reshape(leaf.batch, *leaf.merged) if layout is None else layout.merge(x, leaf)


def _bundle(leaves: list[Array], whole: LeafPlan, layout: StackLayout | None) -> Array:
    """The merged leaves of a bucket as one."""
    if layout is None or len(leaves) == 1:
        return leaves[0]
    # Pinned on both sides, or each leaf would be exchanged by itself.
    return layout.loose(jnp.concatenate([layout.loose(x, whole) for x in leaves]), whole)


def _tiled(leaf: LeafPlan, layout: StackLayout | None) -> bool:
    """Whether all cells can be cut at once: equal ones, of a leaf that every device has whole."""
    equal = len({cell.size for cell in leaf.cells}) == 1 < len(leaf.cells)
    return equal and (layout is None or not any(layout.merged(leaf)))


def _cuts(leaf: LeafPlan, layout: StackLayout | None) -> list[tuple[Cell, int]]:
    """The cells that are cut one by one, or one for all of them, and blocks of each."""
    if _tiled(leaf, layout):
        return [(leaf.cells[0], len(leaf.cells) * leaf.batch)]
    return [(cell, leaf.batch) for cell in leaf.cells]


def _cut(x: Array, leaf: LeafPlan, layout: StackLayout | None) -> list[Array]:
    """The cells of a merged leaf `(batch, *merged)`, cut dimension by dimension, in their order."""
    if _tiled(leaf, layout):
        return [_tile(x, leaf)]
    pieces = [x] if leaf.cells else []  # an empty leaf has none
    for axis in range(len(leaf.merged)):
        # Pinned on both sides, or the partitioner cuts in the layout that comes next.
        pin = functools.partial(_pin, layout, leaf, axis)
        edges = sorted({(c.start[axis], c.start[axis] + c.size[axis]) for c in leaf.cells})
        pieces = [
            pin(jax.lax.slice_in_dim(whole, *edge, axis=axis + 1))
            for whole in (x if layout is None else layout.open(x, leaf, axis) for x in pieces)
            for edge in edges
        ]
    return pieces


def _tile(x: Array, leaf: LeafPlan) -> Array:
    """All cells of a merged leaf: one operation to compile, however many they are."""
    size = leaf.cells[0].size
    grid = [n for d, s in zip(leaf.merged, size, strict=True) for n in (d // s, s)]
    outer, inner = range(1, len(grid), 2), range(2, len(grid) + 1, 2)
    return x.reshape(-1, *grid).transpose(*outer, 0, *inner).reshape(-1, *size)


def _untile(x: Array, leaf: LeafPlan) -> Array:
    """The way back from `_tile`."""
    size = leaf.cells[0].size
    counts = [d // s for d, s in zip(leaf.merged, size, strict=True)]
    batch = len(size)  # its place
    grid = [a for k in range(batch) for a in (k, batch + 1 + k)]
    x = x.reshape(*counts, leaf.batch, *size).transpose(batch, *grid)
    return x.reshape(leaf.batch, *leaf.merged)


def _pin(layout: StackLayout | None, leaf: LeafPlan, axis: int, x: Array) -> Array:
    return x if layout is None else layout.cut(x, leaf, axis)


def join(
    stacks: dict[str, Array],
    plan: Sequence[LeafPlan],
    dtypes: Sequence[Any],
    layout: StackLayout | None = None,
) -> list[Array]:
    """Inverse of `split`: the leaves, cast to `dtypes`."""
    buckets = buckets_of(plan, dtypes, layout)
    if layout is not None:
        order = block_order(buckets, plan)
        stacks = {key: layout.from_owners(x, key, order[key]) for key, x in stacks.items()}
    offset = dict.fromkeys(stacks, 0)
    leaves: dict[int, Array] = {}
    for members, whole in buckets:
        dtype, pieces = dtypes[members[0]], []
        for cell, count in _cuts(whole, layout):
            begin = offset[cell.key]
            offset[cell.key] = begin + count
            piece = stacks[cell.key][begin : begin + count]
            if layout is None:
                piece = piece.astype(dtype)
            else:
                piece = layout.piece(layout.leaving(piece, dtype), cell.key)
            pieces.append(piece.swapaxes(1, 2) if cell.transposed else piece)
        x = _assemble(pieces, whole, layout, dtype)
        for i, part in zip(members, _unbundle(x, len(members), whole, layout), strict=True):
            leaves[i] = _unmerge(part, plan[i], dtype, layout)
    return [leaves[i] for i in range(len(plan))]


def _assemble(pieces: list[Array], leaf: LeafPlan, layout: StackLayout | None, dtype: Any) -> Array:
    """Concatenates cells dimension by dimension, the last one first."""
    if not pieces:
        return jnp.zeros((leaf.batch, *leaf.merged), dtype)
    if _tiled(leaf, layout):
        return _untile(_pin(layout, leaf, -1, pieces[0]), leaf)
    for axis in reversed(range(len(leaf.merged))):
        per_row = len({cell.start[axis] for cell in leaf.cells})
        pin = functools.partial(_pin, layout, leaf, axis)
        pieces = list(map(pin, pieces))
        pieces = [
            jnp.concatenate(pieces[i : i + per_row], axis + 1)
            for i in range(0, len(pieces), per_row)
        ]
        pieces = pieces if layout is None else [layout.close(x, leaf, axis) for x in pieces]
    return pieces[0]


def _unbundle(x: Array, count: int, whole: LeafPlan, layout: StackLayout | None) -> list[Array]:
    """The way back from `_bundle`."""
    if layout is None or count == 1:
        return [x]
    return [layout.loose(part, whole) for part in jnp.split(layout.loose(x, whole), count)]


def _unmerge(x: Array, leaf: LeafPlan, dtype: Any, layout: StackLayout | None) -> Array:
    """The way back from `_merge`."""
    permuted = [leaf.shape[a] for a in leaf.permutation]
    inverse = sorted(range(len(permuted)), key=leaf.permutation.__getitem__)
    x = x.reshape(permuted) if layout is None else layout.unmerge(x, leaf)
    x = x.transpose(inverse)
    return x if layout is None else layout.leave(x, leaf).astype(dtype)
