"""From a parameter tree to stacks of equal blocks and back."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shampoo_jax.blocks import Blocks, is_placeholder
from shampoo_jax.dimension_numbers import DimensionOption, resolve_dimension_numbers
from shampoo_jax.exponents import Exponents
from shampoo_jax.hyperparameters import check_static
from shampoo_jax.plan import LeafPlan, make_plan
from shampoo_jax.skipping import drop_missing, fill_missing, missing_paths, where_blocks

Array = jax.Array


class BlockedState(NamedTuple):
    """State of `blocked`."""

    fingerprints: Any  # uint32[leaves, 4], checksums of names, shapes and layouts
    leaves: Any  # per stack int32[N], the leaf, a row of fingerprints, each block was cut from
    inner: Any  # state of the inner transformation, keyed by stack


def split(leaves: Sequence[Array], plan: Sequence[LeafPlan]) -> dict[str, Array]:
    """Cuts arrays into blocks and stacks equal shapes, in the order of leaves, cells and batch.

    Args:
      leaves: One array per entry of `plan`.
      plan: Layout from `make_plan`.

    Returns:
      Stacks `[N, *block]` by block key, in float32 or the leaves' wider dtype.
    """
    pieces: dict[str, list[Array]] = {}
    for x, leaf in zip(leaves, plan, strict=True):
        x = x.transpose(leaf.permutation).reshape(leaf.batch, *leaf.merged)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        for cell in leaf.cells:
            limit = [s + n for s, n in zip(cell.start, cell.size, strict=True)]
            piece = jax.lax.slice(x, (0, *cell.start), (leaf.batch, *limit))
            piece = piece.swapaxes(1, 2) if cell.transposed else piece
            pieces.setdefault(cell.key, []).append(piece)
    return {
        key: jnp.concatenate([p.astype(jnp.result_type(*parts)) for p in parts])
        for key, parts in pieces.items()
    }


def join(stacks: dict[str, Array], plan: Sequence[LeafPlan], dtypes: Sequence[Any]) -> list[Array]:
    """Inverse of `split`: the leaves, cast to `dtypes`."""
    offset = dict.fromkeys(stacks, 0)
    leaves = []
    for leaf, dtype in zip(plan, dtypes, strict=True):
        pieces = []
        for cell in leaf.cells:
            begin = offset[cell.key]
            offset[cell.key] = begin + leaf.batch
            piece = stacks[cell.key][begin : begin + leaf.batch].astype(dtype)
            pieces.append(piece.swapaxes(1, 2) if cell.transposed else piece)
        x = _assemble(pieces, leaf) if pieces else jnp.zeros(leaf.shape, dtype)
        permuted = [leaf.shape[a] for a in leaf.permutation]
        inverse = sorted(range(len(permuted)), key=leaf.permutation.__getitem__)
        leaves.append(x.reshape(permuted).transpose(inverse))
    return leaves


def _assemble(pieces: list[Array], leaf: LeafPlan) -> Array:
    """Concatenates cells dimension by dimension, the last one first."""
    for axis in reversed(range(len(leaf.merged))):
        per_row = len({cell.start[axis] for cell in leaf.cells})
        pieces = [
            jnp.concatenate(pieces[i : i + per_row], axis + 1)
            for i in range(0, len(pieces), per_row)
        ]
    return pieces[0]


def blocked(
    inner: optax.GradientTransformation,
    *,
    block_size: int | None = 1024,
    merge: int | None = 2,
    canonical: bool = True,
    dimension_numbers: DimensionOption = None,
    exponents: Exponents | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on stacks of equal blocks instead of on the parameter tree.

    Every parameter is permuted and merged to its block order, cut into boxes of at most
    `block_size` per edge, and boxes of equal shape from all parameters form one stack. `inner` sees
    `{"3072x768": Blocks, ...}`; its state is keyed likewise.

    Args:
      inner: Transformation of trees of `Blocks`: the parts of this package, chains of them, and
        stock transformations lifted by `on_updates`, `on_gradients` or `from_gradients`.
      block_size: Largest edge of a block; None for whole parameters.
      merge: Neighbouring dimensions are merged while at least this many remain and the product is
        at most `block_size`; 1 turns small matrices into vectors as Meta's package does; None
        leaves all shapes alone.
      canonical: Whether 2-D blocks are stored with the longer dimension first.
      dimension_numbers: Callable of (path, leaf) returning `DimensionNumbers` or None for merging
        alone; `"flax"` stands for `default_dimension_numbers`, None for merging everywhere.
      exponents: Where given, a dimension with exponent 0 is not cut: it has no factor to bound.

    Returns:
      A transformation of parameter trees. Updates have the dtype of the incoming updates.

    Raises:
      ValueError: `block_size` or `merge` below 1 or traced; an unknown name of dimension numbers;
        complex parameters; in `update`, a gradient that is None without `params` to tell whose
        it is.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> tx = shampoo_jax.blocked(shampoo_jax.on_updates(optax.scale(-1.0)), block_size=4)
      >>> params = {"w": jnp.ones((6, 4))}
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> updates["w"].shape, float(updates["w"][5, 3])
      ((6, 4), -1.0)
    """
    check_static(locals())
    for name, value in (("block_size", block_size), ("merge", merge)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1, or None for no limit.")
    rule = resolve_dimension_numbers(dimension_numbers)
    tx = optax.with_extra_args_support(inner)

    def plan_of(tree: Any) -> list[LeafPlan]:
        return make_plan(
            tree,
            block_size=block_size,
            merge=merge,
            canonical=canonical,
            dimension_numbers=rule,
            exponents=exponents,
        )

    def init_fn(params: Any) -> BlockedState:
        if is_placeholder(params):
            # Three leaves stand for all of the state: none of it mirrors a parameter.
            return BlockedState(jnp.zeros(0, jnp.uint32), jnp.zeros(0, jnp.int32), jnp.zeros(0))
        plan = plan_of(params)
        leaves = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.int32), _per_block(range(len(plan)), plan)
        )
        return BlockedState(fingerprints(plan), leaves, tx.init(_stack(params, plan)))

    def update_fn(
        updates: Any, state: BlockedState, params: Any = None, **extra: Any
    ) -> tuple[Any, BlockedState]:
        missing = frozenset() if params is None else missing_paths(updates, params)
        filled = fill_missing(updates, params, missing) if missing else updates
        plan = plan_of(filled)
        if len(plan) != len(state.fingerprints):
            raise ValueError(
                f"{len(plan)} gradients for {len(state.fingerprints)} parameters: where a gradient "
                "is None, pass the parameters too, update(updates, state, params)."
            )
        stacks, inner_state = tx.update(
            _stack(filled, plan),
            state.inner,
            None if params is None else _stack(params, plan),
            **extra,
        )
        absent = missing | extra.get("absent", frozenset())
        if absent:
            present = [p not in absent for p, _ in jax.tree_util.tree_leaves_with_path(filled)]
            inner_state = where_blocks(_per_block(present, plan), inner_state, state.inner)
        leaves, structure = jax.tree.flatten(filled)
        joined = join({key: b.update for key, b in stacks.items()}, plan, [x.dtype for x in leaves])
        new = jax.tree.unflatten(structure, joined)
        return drop_missing(new, missing), state._replace(inner=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _stack(tree: Any, plan: Sequence[LeafPlan]) -> dict[str, Blocks]:
    stacks, blocks, begin = split(jax.tree.leaves(tree), plan), {}, 0
    for key, x in stacks.items():
        index = jnp.arange(begin, begin + len(x), dtype=jnp.int32)
        blocks[key] = Blocks(gradient=x, update=x, index=index)
        begin += len(x)
    return blocks


def _per_block(values: Sequence[int], plan: Sequence[LeafPlan]) -> dict[str, np.ndarray]:
    """One value per leaf, repeated for each of its blocks: `[N]` by stack key."""
    repeated: dict[str, list[int]] = {}
    for value, leaf in zip(values, plan, strict=True):
        for cell in leaf.cells:
            repeated.setdefault(cell.key, []).extend([value] * leaf.batch)
    return {key: np.array(x) for key, x in repeated.items()}


def fingerprints(plan: Sequence[LeafPlan]) -> Array:
    """Checksums of each leaf: `identity` in columns 0 to 2, how it is cut in column 3.

    Stacks follow the order of the leaves, so a state restored for parameters that were renamed,
    reordered or cut differently would silently feed blocks each other's statistics; `check_state`
    compares these.

    Args:
      plan: Layout from `make_plan`.

    Returns:
      `uint32[leaves, 4]`.
    """
    rows = []
    for leaf in plan:
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
