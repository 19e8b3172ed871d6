"""From a parameter tree to stacks of equal blocks and back."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shampoo_jax.base.hyperparameters import check_static
from shampoo_jax.base.paths import KeyPath, name_of
from shampoo_jax.blocks.blocks import Blocks, is_placeholder
from shampoo_jax.blocks.dimension_numbers import DimensionOption, resolve_dimension_numbers
from shampoo_jax.blocks.exponents import Exponents
from shampoo_jax.blocks.plan import LeafPlan, count_blocks, make_plan
from shampoo_jax.stacks.guard import drop_missing, fill_missing, missing_paths, where_blocks
from shampoo_jax.stacks.layout import StackLayout
from shampoo_jax.stacks.placement import Placement
from shampoo_jax.stacks.slots import Slots, in_turn
from shampoo_jax.stacks.split import join, split

Array = jax.Array


class BlockedState(NamedTuple):
    """State of `blocked`."""

    fingerprints: Any  # uint32[leaves, 4], checksums of names, shapes and layouts
    leaves: Any  # per stack int32[N], the leaf, a row of fingerprints, each block was cut from
    inner: Any  # state of the inner transformation, keyed by stack


def blocked(
    inner: optax.GradientTransformation,
    *,
    block_size: int | None = 1024,
    merge: int | None = 2,
    canonical: bool = True,
    dimension_numbers: DimensionOption = None,
    exponents: Exponents | None = None,
    placement: Placement | None = None,
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
      placement: Mesh and axes over which blocks, their state and all arithmetic on them are split;
        None leaves that to the compiler.

    Returns:
      A transformation of parameter trees. Updates have the dtype of the incoming updates.

    Raises:
      ValueError: `block_size` or `merge` below 1 or traced; an unknown name of dimension numbers;
        complex parameters; in `update`, a gradient that is None without `params` to tell whose
        it is, and, where `params` are given, a gradient of another name or shape than these.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> tx = shampoo_jax.blocked(shampoo_jax.on_updates(optax.scale(-1.0)), block_size=4)
      >>> params = {"w": jnp.ones((6, 4))}
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> updates["w"].shape, float(updates["w"][5, 3])
      ((6, 4), -1.0)
    """
    check_static(locals())
    _check_limits(block_size=block_size, merge=merge)
    tx = optax.with_extra_args_support(inner)
    plan_of = functools.partial(
        make_plan,
        block_size=block_size,
        merge=merge,
        canonical=canonical,
        dimension_numbers=resolve_dimension_numbers(dimension_numbers),
        exponents=exponents,
    )

    def layout_of(tree: Any, plan: list[LeafPlan]) -> StackLayout | None:
        return None if placement is None else StackLayout(placement, tree, plan, exponents)

    def init_fn(params: Any) -> BlockedState:
        if is_placeholder(params):
            # Three leaves stand for all of the state: none of it mirrors a parameter.
            return BlockedState(jnp.zeros(0, jnp.uint32), jnp.zeros(0, jnp.int32), jnp.zeros(0))
        params = jax.tree.map(jnp.asarray, params)
        plan = plan_of(params)
        layout = layout_of(params, plan)
        slots = _slots(plan, layout)
        leaves = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.int32), _per_block(range(len(plan)), plan, slots)
        )
        stacks = split(jax.tree.leaves(params), plan, layout)
        inner_state = tx.init(_as_blocks(stacks, slots.index, {}))
        if layout is not None:
            inner_state = layout.pin_state(inner_state, {k: len(x) for k, x in stacks.items()})
        return BlockedState(fingerprints(plan), leaves, inner_state)

    def update_fn(
        updates: Any, state: BlockedState, params: Any = None, **extra: Any
    ) -> tuple[Any, BlockedState]:
        missing = frozenset() if params is None else missing_paths(updates, params)
        filled, params = _arrays(updates, params, missing)
        plan = plan_of(filled)
        _check_count(plan, state)
        layout = layout_of(filled, plan)
        stacks, inner_state = _run(tx, layout, plan, filled, state.inner, params, extra)
        absent = missing | extra.get("absent", frozenset())
        if absent:
            present = _present_blocks(filled, absent, plan, layout)
            inner_state = where_blocks(present, inner_state, state.inner)
        new = _joined(stacks, plan, filled, layout)
        return drop_missing(new, missing), state._replace(inner=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _joined(
    stacks: dict[str, Array], plan: Sequence[LeafPlan], like: Any, layout: StackLayout | None
) -> Any:
    """The tree whose blocks these are, in the dtypes of another."""
    leaves, structure = jax.tree.flatten(like)
    return structure.unflatten(join(stacks, plan, [x.dtype for x in leaves], layout))


def _check_limits(**limits: int | None) -> None:
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1, or None for no limit.")


def _arrays(updates: Any, params: Any, missing: frozenset[KeyPath]) -> tuple[Any, Any]:
    """Both trees as arrays, with zeros for missing updates, once they are known to fit.

    Blocks of another parameter may be as large, so that nothing else would notice.
    """
    if params is None:
        return jax.tree.map(jnp.asarray, updates), None
    given, wanted = (
        {path: jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (updates, params)
    )
    for path in [*(p for p in wanted if p not in missing), *given]:
        if given.get(path) != wanted.get(path):
            raise ValueError(
                f"parameter {name_of(path)!r} has shape {wanted.get(path)}, its gradient "
                f"{given.get(path)} (None: there is none of this name): pass gradients and "
                "parameters of one tree, and None for a gradient that is missing."
            )
    filled = fill_missing(updates, params, missing) if missing else updates
    return jax.tree.map(jnp.asarray, (filled, params))


def _check_count(plan: Sequence[LeafPlan], state: BlockedState) -> None:
    if len(plan) != len(state.fingerprints):
        raise ValueError(
            f"{len(plan)} gradients for {len(state.fingerprints)} parameters: where a gradient is "
            "None, pass the parameters too, update(updates, state, params)."
        )


def _run(
    tx: optax.GradientTransformationExtraArgs,
    layout: StackLayout | None,
    plan: Sequence[LeafPlan],
    tree: Any,
    state: Any,
    params: Any,
    extra: dict[str, Any],
) -> tuple[dict[str, Array], Any]:
    """Updates by stack and the new state of `tx`, each block computed by its owner."""

    def update(stacks: Any, index: Any, real: Any, weights: Any, state: Any) -> tuple[Any, Any]:
        weights = None if weights is None else _as_blocks(weights, index, real)
        new, state = tx.update(_as_blocks(stacks, index, real), state, weights, **extra)
        return {key: b.update for key, b in new.items()}, state

    stacks = split(jax.tree.leaves(tree), plan, None if layout is None else layout.incoming)
    weights = None if params is None else split(jax.tree.leaves(params), plan, layout)
    if layout is None:
        return update(stacks, _slots(plan, None).index, {}, weights, state)
    return layout.run(update, stacks, weights, state)


def _slots(plan: Sequence[LeafPlan], layout: StackLayout | None) -> Slots:
    return in_turn(count_blocks(plan)) if layout is None else layout.slots


def _present_blocks(
    tree: Any, absent: frozenset[KeyPath], plan: Sequence[LeafPlan], layout: StackLayout | None
) -> dict[str, Any]:
    """Whether each block's gradient is there: `[N]` by stack."""
    present = [path not in absent for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    per_block = _per_block(present, plan, _slots(plan, layout))
    return per_block if layout is None else layout.pin_stacks(per_block)


def _as_blocks(
    stacks: dict[str, Array], index: Mapping[str, Any], real: Mapping[str, Array]
) -> dict[str, Blocks]:
    return {
        key: Blocks(gradient=x, update=x, index=jnp.asarray(index[key]), real=real.get(key))
        for key, x in stacks.items()
    }


def _per_block(values: Sequence[int], plan: Sequence[LeafPlan], slots: Slots) -> dict[str, Any]:
    """One value per leaf, repeated for each of its blocks, -1 for padding: `[N]` by stack key."""
    repeated: dict[str, list[int]] = {}
    for value, leaf in zip(values, plan, strict=True):
        for cell in leaf.cells:
            repeated.setdefault(cell.key, []).extend([value] * leaf.batch)
    return {key: slots.spread(key, np.array(x), -1) for key, x in repeated.items()}


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
