"""Leaves cut into stacks of equal blocks, and put together again."""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shampoo_jax.base.paths import KeyPath, name_of
from shampoo_jax.blocks.blocks import MeanSquares
from shampoo_jax.blocks.plan import LeafPlan
from shampoo_jax.stacks.layout import Bucket, Layout

Array = jax.Array


def split(leaves: Sequence[Array], layout: Layout) -> dict[str, Array]:
    """Cuts arrays into blocks and stacks equal shapes, at their owners.

    Args:
      leaves: One array per leaf of the plan, float32 or float64.
      layout: How leaves are cut and where they go.

    Returns:
      Stacks `[N, *block]` by key, in the order of the plan, zero blocks at their end.
    """
    pieces: dict[str, list[Array]] = {}
    for bucket in layout.buckets:
        x = _bundle(leaves, bucket, layout)
        for key, piece in _cut(x, bucket, layout).items():
            pieces.setdefault(key, []).append(piece)
    return {key: _to_owners(parts, key, layout, leaves) for key, parts in pieces.items()}


def split_further(
    further: Mapping[str, Any], like: Any, layout: Layout, absent: Collection[KeyPath]
) -> dict[str, dict[str, Any]]:
    """Cuts other trees as gradients are cut.

    Args:
      further: By name, trees that have the leaves of `like`, or these with one axis more in front;
        `MeanSquares` are cut already.
      like: Tree of gradients.
      layout: How its leaves are cut and where they go.
      absent: Leaves that have no gradient, and need to have none here: zeros stand for it.

    Returns:
      Stacks `[N, *block]`, or `[N, k, *block]` with an axis of k in front, by key, then by name.
    """
    found: dict[str, dict[str, Any]] = {key: {} for key in layout.lengths}
    for name, tree in further.items():
        if isinstance(tree, MeanSquares):
            for key, factors in _factors_of(tree, layout, name).items():
                found[key][name] = factors
            continue
        leaves, depth = _leaves_of(tree, like, name, absent)
        cut = functools.partial(split, layout=layout)
        for key, x in (jax.vmap(cut, out_axes=1) if depth else cut)(leaves).items():
            found[key][name] = x
    return found


def _factors_of(means: MeanSquares, layout: Layout, name: str) -> dict[str, Any]:
    """Factors by stack, if they were made for blocks such as these."""
    found = {key: {len(s) for s in jax.tree.leaves(f)} for key, f in means.factors.items()}
    if found.keys() != layout.lengths.keys() or any(
        n - {layout.lengths[key]} for key, n in found.items()
    ):
        raise ValueError(
            f"further[{name!r}] was made for other blocks, {sorted(found)}, than these, "
            f"{sorted(layout.lengths)}: call mean_of_squares with this optimizer, and add "
            "gradients of all of its parameters."
        )
    return means.factors


def _leaves_of(
    tree: Any, like: Any, name: str, absent: Collection[KeyPath]
) -> tuple[list[Array], int]:
    """The leaves of a further tree in the order of `like`, and how many axes they have more."""
    given = dict(jax.tree_util.tree_leaves_with_path(tree))
    wanted = jax.tree_util.tree_leaves_with_path(like)
    fronts = {np.shape(given[p])[: np.ndim(given[p]) - g.ndim] for p, g in wanted if p in given}
    front = min(fronts, default=())
    for path, g in wanted:
        if path in absent and path not in given:
            given[path] = jnp.zeros((*front, *g.shape), g.dtype)
        found = np.shape(given[path]) if path in given else None
        if found != (*front, *g.shape) or len(front) > 1:
            raise ValueError(
                f"further[{name!r}] has shape {found} (None: no such leaf) for parameter "
                f"{name_of(path)!r}, its gradient {g.shape}: give a tree like that of the "
                "gradients, all leaves with at most one axis of one length in front."
            )
    return [given[path] for path, _ in wanted], len(front)


def join(stacks: dict[str, Array], layout: Layout, dtypes: Sequence[Any]) -> list[Array]:
    """Inverse of `split`: the leaves, cast to `dtypes`."""
    gathered = {key: _from_owners(x, key, layout) for key, x in stacks.items()}
    offset = dict.fromkeys(stacks, 0)
    leaves: list[Any] = [None] * len(dtypes)
    for bucket in layout.buckets:
        pieces = _pieces(gathered, offset, bucket, layout)
        x = _assemble(pieces, bucket, layout, dtypes[bucket.members[0]])
        _unbundle(x, bucket, layout, dtypes, leaves)
    return leaves


def _bundle(leaves: Sequence[Array], bucket: Bucket, layout: Layout) -> Array:
    """The merged leaves of a bucket, `(members * batch, *merged)`."""
    devices, leaf, route = layout.devices, bucket.leaf, bucket.route
    narrow, shape = devices.communication_dtype, (leaf.batch, *leaf.merged)
    # Axes that merging loses need not divide the batch.
    fits = not route.merged[0] or leaf.batch % devices.size(route.merged[0]) == 0  # type: ignore
    spec = route.merged if fits else route.inward[0][-1]
    merged = []
    for i in bucket.members:
        x = devices.put(leaves[i], layout.own[i])
        # The narrow value is pinned as well, or the wide one would travel.
        x = x if narrow is None else devices.put(x.astype(narrow), layout.own[i])
        merged.append(devices.reshape(x.transpose(layout.plan.leaves[i].permutation), shape, spec))
    if len(merged) == 1:
        return merged[0]
    # Pinned on both sides, or each leaf would be exchanged by itself.
    pinned = [devices.put(x, route.merged) for x in merged]
    return devices.put(jnp.concatenate(pinned), route.merged)


def _unbundle(
    x: Array, bucket: Bucket, layout: Layout, dtypes: Sequence[Any], leaves: list[Any]
) -> None:
    """The way back from `_bundle`, into the list of leaves."""
    devices, route, members = layout.devices, bucket.route, bucket.members
    parts = [x]
    if len(members) > 1:
        split_up = jnp.split(devices.put(x, route.merged), len(members))
        parts = [devices.put(part, route.merged) for part in split_up]
    for i, part in zip(members, parts, strict=True):
        leaf = layout.plan.leaves[i]
        permuted = [leaf.shape[a] for a in leaf.permutation]
        spec = tuple([layout.own[i][a] for a in leaf.permutation])
        part = devices.reshape(part, permuted, spec).transpose(np.argsort(leaf.permutation))
        leaves[i] = devices.put(part, layout.own[i]).astype(dtypes[i])


def _cut(x: Array, bucket: Bucket, layout: Layout) -> dict[str, Array]:
    """Blocks of a bundle by stack, in the order of members, cells and batch."""
    leaf, put = bucket.leaf, layout.devices.put
    if bucket.tiled:
        cell = leaf.cells[0]
        tiles = _tile(x, len(bucket.members), leaf)
        tiles = tiles.swapaxes(1, 2) if cell.transposed else tiles
        return {cell.key: put(tiles, layout.pieces[cell.key])}
    pieces = [x] if leaf.cells else []  # an empty leaf has none
    for axis, way in enumerate(bucket.route.inward[: len(leaf.merged)]):
        strips = []
        for piece in pieces:
            for spec in way:
                piece = put(piece, spec)
            for begin, end in _edges(leaf, axis):
                # Pinned on both sides, or the partitioner cuts in the layout that comes next.
                strip = jax.lax.slice_in_dim(piece, begin, end, axis=axis + 1)
                strips.append(put(strip, way[-1]))
        pieces = strips
    found = {}
    for key, numbers in bucket.cells.items():
        cells = []
        for k in numbers:
            piece = pieces[k].swapaxes(1, 2) if leaf.cells[k].transposed else pieces[k]
            cells.append(put(piece, layout.pieces[key]))
        found[key] = _interleave(cells, len(bucket.members))
    return found


def _pieces(
    stacks: dict[str, Array], offset: dict[str, int], bucket: Bucket, layout: Layout
) -> list[Array]:
    """The way back from `_cut`: cells, or tiles, of a bundle from gathered stacks."""
    leaf, put, members = bucket.leaf, layout.devices.put, len(bucket.members)
    pieces: list[Any] = [None] * (1 if bucket.tiled else len(leaf.cells))
    for key, numbers in bucket.cells.items():
        begin = offset[key]
        offset[key] = begin + members * leaf.batch * len(numbers)
        x = stacks[key][begin : offset[key]]
        some = [x] if bucket.tiled else _separate(x, members, leaf.batch, len(numbers))
        for k, piece in zip(numbers, some, strict=False):
            piece = put(piece, layout.pieces[key])
            pieces[k] = piece.swapaxes(1, 2) if leaf.cells[k].transposed else piece
    return pieces


def _assemble(pieces: list[Array], bucket: Bucket, layout: Layout, dtype: Any) -> Array:
    """Concatenates cells dimension by dimension, the last one first."""
    leaf, put, members = bucket.leaf, layout.devices.put, len(bucket.members)
    if not pieces:
        return jnp.zeros((members * leaf.batch, *leaf.merged), dtype)
    if bucket.tiled:
        return _untile(put(pieces[0], bucket.route.cut), members, leaf)
    for axis in reversed(range(len(leaf.merged))):
        way, count = bucket.route.inward[axis], len(_edges(leaf, axis))
        pinned = [put(x, way[-1]) for x in pieces]
        pieces = []
        for i in range(0, len(pinned), count):
            strip = pinned[i] if count == 1 else jnp.concatenate(pinned[i : i + count], axis + 1)
            for spec in way[::-1]:
                strip = put(strip, spec)
            pieces.append(strip)
    return pieces[0]


def _edges(leaf: LeafPlan, axis: int) -> list[tuple[int, int]]:
    """Where a merged leaf is cut along an axis."""
    return sorted({(c.start[axis], c.start[axis] + c.size[axis]) for c in leaf.cells})


def _interleave(cells: list[Array], members: int) -> Array:
    """Cells of a bundle, each `[members * batch, *block]`, one after the other of each member."""
    if len(cells) == 1 or members == 1:
        return cells[0] if len(cells) == 1 else jnp.concatenate(cells)
    block = cells[0].shape[1:]
    return jnp.concatenate([x.reshape(members, -1, *block) for x in cells], 1).reshape(-1, *block)


def _separate(x: Array, members: int, batch: int, cells: int) -> list[Array]:
    """The way back from `_interleave`."""
    if members == 1 or cells == 1:
        return jnp.split(x, cells) if cells > 1 else [x]
    apart = x.reshape(members, cells, batch, *x.shape[1:])
    return [apart[:, k].reshape(-1, *x.shape[1:]) for k in range(cells)]


def _tile(x: Array, members: int, leaf: LeafPlan) -> Array:
    """All cells of merged leaves: one operation to compile, however many they are."""
    size = leaf.cells[0].size
    grid = [n for d, s in zip(leaf.merged, size, strict=True) for n in (d // s, s)]
    outer, inner = range(2, len(grid) + 2, 2), range(3, len(grid) + 3, 2)
    x = x.reshape(members, -1, *grid).transpose(0, *outer, 1, *inner)
    return x.reshape(-1, *size)


def _untile(x: Array, members: int, leaf: LeafPlan) -> Array:
    """The way back from `_tile`."""
    size = leaf.cells[0].size
    counts = [d // s for d, s in zip(leaf.merged, size, strict=True)]
    batch = len(size) + 1  # its place
    grid = [a for k in range(1, batch) for a in (k, batch + k)]
    x = x.reshape(members, *counts, leaf.batch, *size).transpose(0, batch, *grid)
    return x.reshape(members * leaf.batch, *leaf.merged)


def _to_owners(parts: list[Array], key: str, layout: Layout, leaves: Sequence[Array]) -> Array:
    """A stack of these blocks in the plan's order, filled with zero blocks, at its owners."""
    x = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    order, fill = layout.order[key], layout.lengths[key] - len(x)
    if order is not None:
        x = x[order]
    if fill:
        x = jnp.pad(x, ((0, fill), *[(0, 0)] * (x.ndim - 1)))
    for spec in layout.routes[key]:
        x = layout.devices.put(x, spec)
    if layout.devices.communication_dtype is None:
        return x
    wide = [leaves[i].dtype for i in np.unique(layout.plan.owners[key])]
    return x.astype(functools.reduce(jnp.promote_types, wide))


def _from_owners(x: Array, key: str, layout: Layout) -> Array:
    """The way back, rounded to what travels."""
    order, narrow = layout.order[key], layout.devices.communication_dtype
    x = x if narrow is None else x.astype(narrow)
    for spec in layout.routes[key][::-1]:
        x = layout.devices.put(x, spec)
    return x if order is None else x[np.argsort(order)]
