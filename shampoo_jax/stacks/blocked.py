"""From a parameter tree to stacks of equal blocks and back."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shampoo_jax.base.hyperparameters import check_static
from shampoo_jax.base.options import check_kind, check_options
from shampoo_jax.base.paths import KeyPath
from shampoo_jax.blocks.blocking import Blocking
from shampoo_jax.blocks.blocks import Blocks, Unread, is_placeholder, where_block
from shampoo_jax.blocks.exponents import ExponentOption, resolve_exponents
from shampoo_jax.blocks.plan import Plan, make_plan
from shampoo_jax.stacks.chunks import chunk_of, in_chunks
from shampoo_jax.stacks.guard import Guarded, guard
from shampoo_jax.stacks.layout import Layout, OneDevice
from shampoo_jax.stacks.placement import Placement, laid_as
from shampoo_jax.stacks.split import join, split, split_further

Array = jax.Array

# Of what a saved state means: raised whenever the same leaves would be read in another way.
FORMAT = 2


class BlockedState(NamedTuple):
    """State of `blocked`."""

    format: Array  # int32[], `FORMAT`
    fingerprints: Array  # uint32[leaves, 4], checksums of names, shapes and layouts
    leaves: Any  # per stack int32[N], the leaf, a row of fingerprints, each block was cut from
    inner: Any  # state of the inner transformation, keyed by stack


class Design(NamedTuple):
    """What a transformation was built from, for `explain`.

    Attributes:
      inner: What runs on the stacks.
      blocking: How parameters are cut.
      exponents: The option, resolved.
      placement: Where blocks lie; None on one device.
      rebuild: The same transformation for another placement.
      chunk: Blocks of a stack that are computed at a time, see `chunk_of`.
      work: What refreshes cost, see `directions.walk.Work`; None for parts chained by hand.
    """

    inner: optax.GradientTransformation
    blocking: Blocking
    exponents: Any
    placement: Placement | None
    rebuild: Callable[[Placement | None], optax.GradientTransformation]
    chunk: Any = None
    work: Any = None


def blocked(
    inner: optax.GradientTransformation,
    *,
    blocking: Blocking | None = None,
    exponents: ExponentOption = None,
    chunk: int | str | None = None,
    placement: Placement | None = None,
) -> Guarded:
    """Runs `inner` on stacks of equal blocks instead of on the parameter tree.

    Every parameter is permuted and merged to the dimensions of its blocks, cut into boxes, and
    boxes of equal shape from all parameters form one stack. `inner` sees
    `{"3072x768": Blocks, ...}`; its state is keyed likewise. Gradients that are missing, narrow or
    not finite are dealt with before, see `guard`.

    Further trees are cut along: with `update(gradients, state, params, further={"halves": tree})`
    parts find stacks of that tree in `Blocks.further["halves"]`. Its leaves have the paths and
    shapes of the gradients, or one axis more in front: k gradients of microbatches, say.

    Args:
      inner: Transformation of stacks: the parts of this package, chains of them, and stock
        transformations lifted by `on_updates`, `on_gradients` or `from_gradients`.
      blocking: How parameters are read and cut; None means `Blocking()`.
      exponents: `e` of the inverse roots, carried by `Blocks` to all parts, see
        `scale_by_shampoo`; None means Shampoo's `1 / (2 * ndim)`.
      chunk: Most blocks of a stack that are computed at the same time, which bounds temporary
        memory; `"auto"` for a number by size, see `chunk_of`. Parts then have to treat every block
        by itself. None computes whole stacks.
      placement: Mesh and axes over which blocks, their state and all arithmetic on them are split;
        None means one device.

    Returns:
      A transformation of parameter trees. Updates have the dtype of the incoming updates. Its state
      is a `BlockedState` inside `optax.ApplyIfFiniteState`.

    Raises:
      ValueError: A traced option; exponents that are none; complex parameters; in `update`, a
        gradient that is None without `params` to tell whose it is, and, where `params` are given, a
        gradient of another name or shape than these.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> negate = shampoo_jax.on_updates(optax.scale(-1.0))
      >>> tx = shampoo_jax.blocked(negate, blocking=shampoo_jax.Blocking(size=4))
      >>> params = {"w": jnp.ones((6, 4))}
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> updates["w"].shape, float(updates["w"][5, 3])
      ((6, 4), -1.0)
    """
    check_static(locals())
    check_options({"inner": inner})
    check_kind("blocking", blocking, Blocking, "Blocking(size=64)")
    check_kind("placement", placement, Placement, "Placement(mesh, owners='data')")
    blocking = Blocking() if blocking is None else blocking
    resolved = resolve_exponents(exponents)

    if chunk != "auto":
        check_options({"chunk": chunk})
    frame: Any = {"blocking": blocking, "exponents": exponents, "chunk": chunk}

    def rebuild(placement: Placement | None) -> optax.GradientTransformation:
        return blocked(inner, placement=placement, **frame)

    walk = _Walk(optax.with_extra_args_support(inner), blocking, resolved, chunk, placement)
    tx = optax.GradientTransformationExtraArgs(walk.init, walk.update)
    return guard(tx, Design(inner, blocking, resolved, placement, rebuild, chunk))


class _Walk:
    """The two functions of `blocked`, with the layouts that they have made so far."""

    def __init__(
        self, inner: optax.GradientTransformationExtraArgs, blocking: Blocking, exponents: Any,
        chunk: Any, placement: Placement | None,
    ) -> None:  # fmt: skip
        self.inner, self.chunk = inner, chunk
        self.blocking, self.exponents = blocking, exponents
        self.devices = OneDevice() if placement is None else placement
        self.layout_of = functools.lru_cache(maxsize=16)(self._layout)
        self.reads_parameters = False

    def _layout(self, structure: Any, *leaves: tuple[tuple[int, ...], Any]) -> Layout:
        """The layout of a tree of such leaves; it follows from their shapes, paths and options."""
        tree = structure.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
        return Layout(self.devices, tree, make_plan(tree, self.blocking, self.exponents))

    def init(self, params: Any) -> BlockedState:
        if is_placeholder(params):
            # Leaves that stand for all of the state: none of it mirrors a parameter.
            return BlockedState(*(jnp.zeros(0, jnp.int32) for _ in range(4)))
        leaves, structure = jax.tree.flatten(params)
        layout = self.layout_of(structure, *map(described, leaves))
        blocks = self._blocks(layout, split(leaves, layout), layout.index)
        numbers = np.arange(len(leaves), dtype=np.int32)
        return BlockedState(
            jnp.asarray(FORMAT, jnp.int32),
            fingerprints(layout.plan),
            layout.per_block(numbers, -1),
            layout.pin_state(self.inner.init(blocks)),
        )

    def update(
        self, updates: Any, state: BlockedState, params: Any = None, **extra: Any
    ) -> tuple[Any, BlockedState]:
        leaves, structure = jax.tree.flatten(updates)
        absent = extra.get("absent", frozenset())
        _check_count(leaves, state)
        layout = self.layout_of(structure, *map(described, leaves))
        along = split_further(extra.pop("further", {}), updates, layout.incoming, absent)
        stacks = split(leaves, layout.incoming)

        def step(stacks: Any, index: Any, cut: Any, state: Any) -> tuple[dict[str, Array], Any]:
            """Updates by stack and the new state, of the blocks of one owner."""
            weights = None if params is None else Unread()
            if params is not None and self.reads_parameters:
                weights = self._blocks(layout, {key: x for key, (x, _) in cut.items()}, index)
            blocks = self._blocks(layout, stacks, index)
            for key, (_, others) in cut.items():
                blocks[key] = dataclasses.replace(blocks[key], further=others)
            new, state = self.inner.update(blocks, state, weights, **extra)
            arrays = {}
            for key, b in new.items():
                arrays[key] = b.update
            return arrays, state

        def size_of(key: str, n: int) -> int:
            plan = layout.plan
            return chunk_of(self.chunk, n, plan.shapes[key], plan.powers[key])

        def run() -> tuple[Any, Any]:
            cut = self._cut(params, layout, along)
            return layout.run(in_chunks(step, size_of), stacks, cut, state.inner)

        try:
            new, inner_state = run()
        except Exception:
            # A part asked for parameters, in whatever way; an error of its own comes again.
            if params is None or self.reads_parameters:
                raise
            self.reads_parameters = True
            new, inner_state = run()
        if absent:
            inner_state = _restore(inner_state, state.inner, updates, layout, absent)
        new = join(new, layout, [x.dtype for x in leaves])
        if isinstance(self.devices, OneDevice):  # no rule says where updates go
            new = [laid_as(x, jax.typeof(g).sharding) for x, g in zip(new, leaves, strict=True)]
        return structure.unflatten(new), state._replace(inner=inner_state)

    def _cut(self, params: Any, layout: Layout, along: Any) -> dict[str, tuple[Array | None, Any]]:
        """Stacks of parameters, None until a part has asked for them, and of what comes along."""
        if params is None or not self.reads_parameters:
            return {key: (None, x) for key, x in along.items()}
        weights = split(jax.tree.leaves(params), layout)
        return {key: (weights[key], x) for key, x in along.items()}

    def _blocks(self, layout: Layout, stacks: Any, index: Any) -> dict[str, Blocks]:
        blocks = {}
        for key, x in stacks.items():
            blocks[key] = Blocks.of(x, layout.plan.powers[key], jnp.asarray(index[key]))
        return blocks


def described(x: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of a leaf, all that a plan knows of it."""
    return np.shape(x), jnp.result_type(x)


def _check_count(leaves: list[Any], state: BlockedState) -> None:
    if len(leaves) != len(state.fingerprints):
        raise ValueError(
            f"{len(leaves)} gradients for {len(state.fingerprints)} parameters: where a gradient "
            "is None, pass the parameters too, update(updates, state, params)."
        )


def _restore(
    new: Any, old: Any, updates: Any, layout: Layout, absent: frozenset[KeyPath]
) -> Any:  # fmt: skip
    """The new state, but the old one of blocks without a gradient.

    Leaves that are about no blocks, counts say, are taken as they are.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(updates)]
    present = layout.per_block(np.array([path not in absent for path in paths]), True)
    present = layout.pin_state(present)

    def choose(path: KeyPath, new_leaf: Any, old_leaf: Any) -> Any:
        key = layout.stack_of(path, new_leaf)
        return new_leaf if key is None else where_block(present[key], new_leaf, old_leaf)

    return jax.tree_util.tree_map_with_path(choose, new, old)


def fingerprints(plan: Plan) -> Array:
    """Checksums of each leaf: `identity` in columns 0 to 2, how it is cut in column 3.

    Stacks follow the order of the leaves, so a state restored for parameters that were renamed,
    reordered or cut differently would silently feed blocks each other's statistics; `check_state`
    compares these.

    Args:
      plan: From `make_plan`.

    Returns:
      `uint32[leaves, 4]`.
    """
    rows = []
    for leaf in plan.leaves:
        cells = [(c.key, c.start, c.size, c.transposed) for c in leaf.cells]
        layout = _words((leaf.permutation, leaf.batch, leaf.merged, cells), 1)
        rows.append([*identity(leaf.name, leaf.shape), *layout])
    return jnp.asarray(np.array(rows, np.uint32).reshape(-1, 4))


def identity(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Checksums of a leaf's name (64 bits: it identifies the leaf) and of its shape (32 bits)."""
    (low, high), (of_shape,) = _words(name, 2), _words(shape, 1)
    return low, high, of_shape


def _words(x: Any, count: int) -> tuple[int, ...]:
    """Checksum of what `repr` writes, in words of 32 bits."""
    digest = hashlib.blake2b(repr(x).encode(), digest_size=4 * count).digest()
    return tuple(np.frombuffer(digest, "<u4").tolist())
