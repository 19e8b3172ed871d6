"""Gradients that are missing or not finite: what they may not touch keeps its old value."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.blocks import Blocks, Part, blocks_part, map_blocks, where_block

Array = jax.Array
KeyPath = tuple[Any, ...]


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
    parameter's and it has its shape) is put back, and the update is None. Step counts advance for
    all parameters alike, as in Meta's distributed_shampoo. Whether a gradient is missing is part of
    the tree's structure, so each pattern compiles once.

    Args:
      inner: The whole optimizer, outermost.

    Returns:
      The transformation; without None leaves it is `inner` itself.
    """
    tx = optax.with_extra_args_support(inner)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        absent = frozenset() if params is None else missing_paths(updates, params)
        if not absent:
            return tx.update(updates, state, params, **extra)
        filled = fill_missing(updates, params, absent)
        new, new_state = tx.update(filled, state, params, absent=absent, **extra)
        shapes = {p: x.shape for p, x in jax.tree_util.tree_leaves_with_path(params) if p in absent}
        return drop_missing(new, absent), _restore(new_state, state, shapes)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def _restore(new: Any, old: Any, shapes: dict[KeyPath, tuple[int, ...]]) -> Any:
    """Old state leaves for the parameters named in `shapes`."""

    def choose(path: KeyPath, new_leaf: Any, old_leaf: Any) -> Any:
        owned = any(
            path[len(path) - len(p) :] == p and jnp.shape(new_leaf) == shape
            for p, shape in shapes.items()
        )
        return old_leaf if owned else new_leaf

    return jax.tree_util.tree_map_with_path(choose, new, old)


def where_blocks(condition: dict[str, Any], new: Any, old: Any) -> Any:
    """Per block, the new state where a condition holds and the old one elsewhere.

    Args:
      condition: `bool[N]` by stack key.
      new: State whose per-block leaves lie below a dictionary entry named as their stack and have
        leading axis N; other leaves (counts) are taken as they are.
      old: State of the same structure.

    Returns:
      The mixed state.
    """

    def choose(path: KeyPath, new_leaf: Any, old_leaf: Any) -> Any:
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey) and k.key in condition]
        if not keys:
            return new_leaf
        return where_block(jnp.asarray(condition[keys[0]]), new_leaf, old_leaf)

    return jax.tree_util.tree_map_with_path(choose, new, old)


def skip_nonfinite_blocks(inner: optax.GradientTransformation) -> Part:
    """Gives blocks whose gradient holds a NaN or an infinity a zero update and an unchanged state.

    Args:
      inner: Part of `Blocks` whose per-block state lies below dictionary entries named as stacks.

    Returns:
      A part. `figures["nonfinite"]` tells which blocks were skipped.
    """
    tx = optax.with_extra_args_support(inner)

    def update(blocks: Any, state: Any, params: Any) -> tuple[Any, Any]:
        finite = map_blocks(
            lambda b: jnp.isfinite(b.gradient).all(tuple(range(1, b.gradient.ndim))), blocks
        )

        def clean(b: Blocks, ok: Array) -> Blocks:
            gradient = where_block(ok, b.gradient, jnp.zeros_like(b.gradient))
            return dataclasses.replace(b, gradient=gradient, update=gradient)

        new, new_state = tx.update(map_blocks(clean, blocks, finite), state, params)
        new = map_blocks(
            lambda b, ok: dataclasses.replace(
                b,
                update=where_block(ok, b.update, jnp.zeros_like(b.update)),
                figures={**b.figures, "nonfinite": ~ok},
            ),
            new,
            finite,
        )
        return new, where_blocks(finite, new_state, state)

    return blocks_part(tx.init, update)
