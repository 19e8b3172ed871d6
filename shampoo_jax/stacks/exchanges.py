"""What a placement makes each device exchange, hold and compute, from shapes alone."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from shampoo_jax.stacks.layout import Bucket, Layout
from shampoo_jax.stacks.placement import Axes, Placement, Spec

Leg = tuple[Spec, Spec, tuple[int, ...], Any]  # before, after, shape, dtype


class Move(NamedTuple):
    """One exchange, as the compiler names it and as every device sees it.

    Attributes:
      kind: `"all-gather"` or `"all-to-all"`.
      result: Bytes of its result on a device.
      devices: Number of devices that exchange with each other.
    """

    kind: str
    result: int
    devices: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends and that it receives, its own part left out."""
        return self.result * (1 - 1 / self.devices)


def change_layout(
    placement: Placement, before: Spec, after: Spec, shape: Sequence[int], itemsize: int
) -> list[Move]:
    """Exchanges that take an array from one layout to another.

    What is split further is cut locally, for nothing. Axes that change their dimension are one
    all-to-all, those that vanish then one all-gather.

    Args:
      placement: For the sizes of mesh axes.
      before: Mesh axes by dimension.
      after: Likewise.
      shape: Of the whole array.
      itemsize: Bytes of an element.

    Returns:
      At most two moves.
    """
    old, new = ({a: k for k, e in enumerate(s) for a in e} for s in (before, after))
    moved = tuple(a for a in old if a in new and old[a] != new[a])
    gone = tuple(a for a in old if a not in new)

    def local(spec: Sequence[Axes]) -> int:
        dims = (-(-d // placement.size(e)) for d, e in zip(shape, spec, strict=True))
        return math.prod(dims) * itemsize

    # Where all axes that stay are at their new dimension, and those that vanish still at the old.
    held = [(*e, *(a for a in b if a in gone)) for e, b in zip(after, before, strict=True)]
    found = [("all-to-all", local(held), moved), ("all-gather", local(after), gone)]
    moves = (Move(kind, size, placement.size(axes)) for kind, size, axes in found if axes)
    return [move for move in moves if move.devices > 1 and move.result]


def stack_moves(layout: Layout, dtypes: Sequence[Any]) -> tuple[list[Move], list[Move]]:
    """Exchanges of gradients to the owners of their blocks, and of updates back.

    Args:
      layout: On a mesh.
      dtypes: Of gradients and updates, one a leaf; they travel in float32 or wider.

    Returns:
      Moves in, moves out.
    """
    wide = [jnp.promote_types(d, jnp.float32) for d in dtypes]
    there, back = [], []
    for before, after, shape, dtype in _all_legs(layout.incoming, wide):
        there += change_layout(layout.devices, before, after, shape, dtype.itemsize)
    for before, after, shape, dtype in _all_legs(layout, wide):
        back += change_layout(layout.devices, after, before, shape, dtype.itemsize)
    return there, back


def _all_legs(layout: Layout, dtypes: Sequence[Any]) -> Iterator[Leg]:
    """Changes of layout of all leaves, in these dtypes, then of all stacks."""
    narrow = layout.devices.communication_dtype
    for bucket in layout.buckets:
        yield from _legs(layout, bucket, jnp.dtype(narrow or dtypes[bucket.members[0]]))
    dtype = jnp.dtype(narrow or jnp.result_type(jnp.float32, *dtypes))
    for key, length in layout.lengths.items():
        for before, after in itertools.pairwise(layout.routes[key]):
            yield before, after, (length, *layout.plan.shapes[key]), dtype


def _legs(layout: Layout, bucket: Bucket, dtype: Any) -> Iterator[Leg]:
    """Changes of layout of the leaves of a bucket until their blocks are concatenated."""
    leaf, batch = bucket.leaf, bucket.leaf.batch * len(bucket.members)
    last = bucket.route.merged
    for axis, inward in enumerate(bucket.route.inward[: len(leaf.merged)]):
        way, last = [last, *inward], inward[-1]
        for _, size in {(c.start[:axis], c.size[:axis]) for c in leaf.cells}:
            for before, after in itertools.pairwise(way):
                yield before, after, (batch, *size, *leaf.merged[axis:]), dtype
    for cell in leaf.cells:
        before, after = bucket.route.stored(cell), layout.pieces[cell.key]
        yield before, after, (batch, *cell.stored), dtype


def elementwise_moves(placement: Placement, tree: Any) -> list[Move]:
    """Exchanges of `Placement.elementwise`: updates back to their own layout, in float32 or wider.

    Args:
      placement: The placement.
      tree: Gradients or their shapes.
    """
    found = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        own = placement.spec_of(path, x)
        split = placement.split_further(np.shape(x), own)
        itemsize = jnp.promote_types(x.dtype, jnp.float32).itemsize
        found += change_layout(placement, split, own, np.shape(x), itemsize)
    return found


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """What `explain` found about a mesh; bytes and FLOPs are those of one device.

    Attributes:
      devices: Size of the mesh.
      owners: Number of owners of blocks.
      exchanges: For each kind of exchange, count and bytes of results in one step.
      sent_in: Bytes that a device sends, and receives, on the way of gradients to owners.
      sent_out: On the way of updates back, momentum and AdamW of the others included.
      state_bytes: Optimizer state.
      blocks: Blocks of an owner by block shape, zero blocks that fill its stacks included.
      padding: Share of the owners' work that is on zero blocks, which fill stacks.
      refresh_flops: One refresh of the roots of an owner, zero blocks included.
    """

    devices: int
    owners: int
    exchanges: dict[str, tuple[int, int]]
    sent_in: float
    sent_out: float
    state_bytes: int
    blocks: dict[str, int]
    padding: float
    refresh_flops: float


def abstract(placement: Placement) -> Placement:
    """The placement on a mesh of sizes alone, whose shapes tell how they are split."""
    mesh = placement.mesh.shape
    kinds = (AxisType.Explicit,) * len(mesh)
    return dataclasses.replace(
        placement, mesh=AbstractMesh(tuple(mesh.values()), tuple(mesh), axis_types=kinds)
    )


def on_mesh(
    layout: Layout, state: Any, matrices: Any, elementwise: list[Move], flops: Mapping[str, float]
) -> OnMesh:
    """Adds up what one device exchanges, holds and computes.

    Args:
      layout: Of the preconditioned parameters, on a mesh.
      state: From `jax.eval_shape` with an `abstract` placement.
      matrices: The preconditioned parameters, or their shapes.
      elementwise: What `elementwise_moves` gives for the other parts of the optimizer.
      flops: To refresh the roots of one block of each stack.
    """
    placement = layout.devices
    there, back = stack_moves(layout, [x.dtype for x in jax.tree.leaves(matrices)])
    back += elementwise
    exchanges: dict[str, tuple[int, int]] = {}
    for kind, result, _ in [*there, *back]:
        count, total = exchanges.get(kind, (0, 0))
        exchanges[kind] = (count + 1, total + result)
    blocks = {k: n // placement.count for k, n in layout.lengths.items()}

    def work(counts: Mapping[str, int]) -> float:
        return sum(n * flops[k] for k, n in counts.items())

    mean = work(layout.plan.counts) / placement.count
    return OnMesh(
        devices=math.prod(placement.mesh.shape.values()),
        owners=placement.count,
        exchanges=exchanges,
        sent_in=sum(move.sent for move in there),
        sent_out=sum(move.sent for move in back),
        state_bytes=sum(map(_local_bytes, jax.tree.leaves(state))),
        blocks=blocks,
        padding=1 - mean / work(blocks) if work(blocks) else 0.0,
        refresh_flops=work(blocks),
    )


def _local_bytes(x: jax.ShapeDtypeStruct) -> int:
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize
