"""Gradients that are missing or not finite: what they may not touch keeps its old value."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.paths import KeyPath, parameter_of, stack_of
from shampoo_jax.blocks.blocks import (
    Blocks,
    Part,
    blocks_part,
    is_placeholder,
    map_blocks,
    where_block,
)

Array = jax.Array


def missing_paths(updates: Any, params: Any) -> frozenset[KeyPath]:
    """Paths of parameters whose update is None.

    Args:
      updates: Tree like `params` in which any leaf may be None.
      params: Parameters; a None here is no parameter and never missing.

    Returns:
      Key paths as in `jax.tree_util.tree_leaves_with_path(params)`.
    """
    with_none = jax.tree_util.tree_leaves_with_path(updates, is_leaf=lambda x: x is None)
    absent = {path for path, leaf in with_none if leaf is None}
    return frozenset(p for p, _ in jax.tree_util.tree_leaves_with_path(params) if p in absent)


def fill_missing(updates: Any, params: Any, absent: frozenset[KeyPath]) -> Any:
    """Zeros in the shape and dtype of the parameter where the update is missing."""
    present = dict(jax.tree_util.tree_leaves_with_path(updates))
    return jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.zeros_like(p) if path in absent else present[path], params
    )


def drop_missing(updates: Any, absent: frozenset[KeyPath]) -> Any:
    """None again where the update was missing."""
    return jax.tree_util.tree_map_with_path(lambda p, x: None if p in absent else x, updates)


def accept_missing(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Lets any transformation accept None for the gradient of some parameters.

    A missing gradient reaches `inner` as zeros, named in the extra argument `absent` that `blocked`
    understands; afterwards every state leaf that belongs to the parameter (its path ends with the
    parameter's, no longer one's, and it has its shape) is put back, and the update is None. Step
    counts advance for all parameters alike, as in Meta's distributed_shampoo. Whether a gradient is
    missing is part of the tree's structure, so each pattern compiles once.

    Args:
      inner: The whole optimizer, outermost.

    Returns:
      The transformation; without None leaves it is `inner` itself.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = accept_missing(optax.adam(0.1))
      >>> params = {"seen": jnp.ones(2), "unseen": jnp.ones(2)}
      >>> grads = {"seen": jnp.ones(2), "unseen": None}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates["seen"].round(2).tolist(), updates["unseen"]
      ([-0.1, -0.1], None)
    """
    tx = optax.with_extra_args_support(inner)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        absent = frozenset() if params is None else missing_paths(updates, params)
        if not absent:
            return tx.update(updates, state, params, **extra)
        filled = fill_missing(updates, params, absent)
        new, new_state = tx.update(filled, state, params, absent=absent, **extra)
        owners: dict[KeyPath, tuple[tuple[int, ...], Array | bool]] = {
            path: (jnp.shape(x), path not in absent)
            for path, x in jax.tree_util.tree_leaves_with_path(params)
        }
        return drop_missing(new, absent), _where_parameters(new_state, state, owners)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def _where_parameters(
    new: Any, old: Any, owners: dict[KeyPath, tuple[tuple[int, ...], Array | bool]]
) -> Any:
    """The new state, but old leaves of parameters whose condition is false.

    Args:
      new: State; a leaf belongs to the parameter that `parameter_of` names if it has its shape.
      old: State of the same structure.
      owners: Shape and condition by path, for all parameters.

    Returns:
      The mixed state.
    """

    def choose(path: KeyPath, new_leaf: Any, old_leaf: Any) -> Any:
        owner = parameter_of(path, owners)
        if owner is None or jnp.shape(new_leaf) != owners[owner][0]:
            return new_leaf
        return jnp.where(owners[owner][1], new_leaf, old_leaf)

    return jax.tree_util.tree_map_with_path(choose, new, old)


def overflow_to_inf(x: jax.Array) -> jax.Array:
    """Infinity where the squares of that many entries of this size would overflow float32."""
    x = jnp.asarray(x)
    largest = float(jnp.finfo(jnp.promote_types(x.dtype, jnp.float32)).max)
    return jnp.where(jnp.abs(x) > (largest / max(x.size, 1)) ** 0.5, jnp.inf, x)


def skip_nonfinite_steps(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Leaves state and parameters alone in a step with any unusable gradient, and counts it.

    Unusable are NaN, infinity, and entries whose squares could overflow when they are summed: one
    such gradient would make a factor or a second moment infinite for ever. It is
    `optax.apply_if_finite` that never gives up; `total_notfinite` in its state is the count.

    Args:
      inner: The optimizer.

    Returns:
      The optimizer with its state inside `optax.ApplyIfFiniteState`.
    """
    tx = optax.with_extra_args_support(inner)

    def init(params: Any) -> optax.ApplyIfFiniteState:
        in_a_row, total = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return optax.ApplyIfFiniteState(in_a_row, jnp.array(True), total, tx.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        usable = [jnp.isfinite(overflow_to_inf(g)).all() for g in jax.tree.leaves(updates)]
        ok = jnp.stack(usable).all() if usable else jnp.array(True)
        # The branch gets the gradients themselves: as checked they would be copied for it.
        new, inner_state = jax.lax.cond(
            ok,
            lambda: tx.update(updates, state.inner_state, params, **extra),
            lambda: (jax.tree.map(jnp.zeros_like, updates), state.inner_state),
        )
        in_a_row = jnp.where(ok, 0, optax.safe_increment(state.notfinite_count))
        total = jnp.where(ok, state.total_notfinite, optax.safe_increment(state.total_notfinite))
        return new, optax.ApplyIfFiniteState(in_a_row, ok, total, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite_blocks` and `skip_nonfinite_parameters`; see `check_finite`."""

    skipped: Any  # times skipped so far: int32[N] by stack, or int32[] by parameter
    inner: Any


def skip_nonfinite_parameters(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Leaves parameters whose gradient is not finite, or overflows when squared, alone.

    Args:
      inner: Transformation of parameter trees whose state leaves that belong to a parameter end
        with its path and have its shape, such as `optax.adamw`.

    Returns:
      The transformation. Its state is a `SkipNonfiniteState` that counts, `int32[]` by parameter.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = skip_nonfinite_parameters(optax.sgd(1.0))
      >>> grads = {"bad": jnp.array([1.0, jnp.nan]), "good": jnp.ones(2)}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> updates["bad"].tolist(), updates["good"].tolist(), int(state.skipped["bad"])
      ([0.0, 0.0], [-1.0, -1.0], 1)
    """
    tx = optax.with_extra_args_support(inner)

    def init(params: Any) -> SkipNonfiniteState:
        if is_placeholder(params):
            # A count has not its parameter's shape: it must not take that parameter's sharding.
            return SkipNonfiniteState(jnp.zeros(0, jnp.int32), tx.init(params))
        count = jax.tree.map(lambda p: jnp.zeros([], jnp.int32), params)
        return SkipNonfiniteState(count, tx.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        finite = jax.tree.map(lambda g: jnp.isfinite(overflow_to_inf(g)).all(), updates)
        keep = lambda g, ok: jnp.where(ok, g, jnp.zeros_like(g))  # noqa: E731
        clean = jax.tree.map(keep, updates, finite)
        new, inner_state = tx.update(clean, state.inner, params, **extra)
        leaves = jax.tree_util.tree_leaves_with_path(updates)
        conditions = jax.tree.leaves(finite)
        owners = {p: (g.shape, ok) for (p, g), ok in zip(leaves, conditions, strict=True)}
        skipped = jax.tree.map(lambda n, ok: n + ~ok, state.skipped, finite)
        inner_state = _where_parameters(inner_state, state.inner, owners)
        return jax.tree.map(keep, new, finite), SkipNonfiniteState(skipped, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def where_blocks(condition: Any, new: Any, old: Any) -> Any:
    """Per block, the new state where a condition holds and the old one elsewhere.

    Args:
      condition: `bool[N]` for every stack, in the tree of the stacks.
      new: State whose per-block leaves have the path of their stack in their own, see `stack_of`,
        and leading axis N; other leaves (counts) are taken as they are.
      old: State of the same structure.

    Returns:
      The mixed state.
    """
    conditions = dict(jax.tree_util.tree_leaves_with_path(condition))

    def choose(path: KeyPath, new_leaf: Any, old_leaf: Any) -> Any:
        stack = stack_of(path, conditions)
        if stack is None or jnp.shape(new_leaf)[:1] != conditions[stack].shape:
            return new_leaf
        return where_block(jnp.asarray(conditions[stack]), new_leaf, old_leaf)

    return jax.tree_util.tree_map_with_path(choose, new, old)


def skip_nonfinite_blocks(inner: optax.GradientTransformation) -> Part:
    """Gives blocks whose gradient is not finite a zero update and an unchanged state.

    So it does with gradients that overflow when squared, see `overflow_to_inf`.

    Args:
      inner: Part of `Blocks` whose per-block state is in the tree of the stacks.

    Returns:
      A part. Its state is a `SkipNonfiniteState` that counts, `int32[N]` by stack; see
      `check_finite`.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> walk = skip_nonfinite_blocks(shampoo_jax.filter_gradient())
      >>> tx = shampoo_jax.blocked(walk, block_size=2)
      >>> grads = {"w": jnp.array([1.0, jnp.nan, 3.0, 4.0])}  # two blocks
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> updates["w"].tolist(), state.inner.skipped["2"].tolist()
      ([0.0, 0.0, 3.0, 4.0], [1, 0])
    """
    tx = optax.with_extra_args_support(inner)

    def init(params: Any) -> SkipNonfiniteState:
        count = map_blocks(lambda p: jnp.zeros(len(p.update), jnp.int32), params)
        return SkipNonfiniteState(count, tx.init(params))

    def update(blocks: Any, state: Any, params: Any) -> tuple[Any, Any]:
        finite = map_blocks(
            lambda b: jnp.isfinite(overflow_to_inf(b.gradient)).all(
                tuple(range(1, b.gradient.ndim))
            ),
            blocks,
        )

        def clean(b: Blocks, ok: Array) -> Blocks:
            gradient = where_block(ok, b.gradient, jnp.zeros_like(b.gradient))
            return dataclasses.replace(b, gradient=gradient, update=gradient)

        new, new_state = tx.update(map_blocks(clean, blocks, finite), state.inner, params)
        new = map_blocks(
            lambda b, ok: dataclasses.replace(
                b, update=where_block(ok, b.update, jnp.zeros_like(b.update))
            ),
            new,
            finite,
        )
        skipped = map_blocks(lambda b, n, ok: n + ~ok, blocks, state.skipped, finite)
        return new, SkipNonfiniteState(skipped, where_blocks(finite, new_state, state.inner))

    return blocks_part(init, update)


def check_finite(opt_state: Any) -> None:
    """Raises where gradients were not finite and steps or blocks were skipped, for a training loop.

    To be called outside jit, as often as a stop may be late: it waits for the step.

    Args:
      opt_state: State of any optimizer that counts what it skips: the aliases, `complete`,
        `skip_nonfinite_blocks`, `optax.apply_if_finite`, nested in whatever wrappers.

    Raises:
      FloatingPointError: Something was skipped since the state was made; the message says how many
        steps and, with `"skip_blocks"`, how many times a block or an AdamW parameter.
      ValueError: The state counts nothing.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> tx = shampoo_jax.shampoo(0.1)
      >>> params = {"w": jnp.ones((2, 2))}
      >>> _, state = tx.update({"w": jnp.full((2, 2), jnp.nan)}, tx.init(params), params)
      >>> shampoo_jax.check_finite(state)
      Traceback (most recent call last):
      FloatingPointError: gradients were not finite: 1 step and 0 blocks were skipped so far.
    """
    counters = (optax.ApplyIfFiniteState, SkipNonfiniteState)
    pending, steps, parts, found = [opt_state], 0, 0, False
    while pending:
        state = pending.pop()
        for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, counters)):
            if isinstance(node, optax.ApplyIfFiniteState):
                found, steps = True, steps + int(node.total_notfinite)
                pending.append(node.inner_state)
            elif isinstance(node, SkipNonfiniteState):
                counts = [int(jnp.sum(x)) for x in jax.tree.leaves(node.skipped)]
                found, parts = True, parts + sum(counts)
                pending.append(node.inner)
    if not found:
        raise ValueError(
            "this optimizer state counts no skipped gradients: build the optimizer with nonfinite="
            "'skip' or 'skip_blocks', or wrap it in optax.apply_if_finite."
        )
    if steps or parts:
        raise FloatingPointError(
            f"gradients were not finite: {steps} step{'' if steps == 1 else 's'} and {parts} "
            f"block{'' if parts == 1 else 's'} were skipped so far."
        )
