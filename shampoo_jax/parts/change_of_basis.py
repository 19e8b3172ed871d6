"""An inner state when the basis it lives in changes: what is carried along, what cannot be."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shampoo_jax.base.paths import KeyPath, stack_of
from shampoo_jax.blocks.blocks import Blocks, Matrices, Stacks, along
from shampoo_jax.matrix.products import apply_matrices

Array = jax.Array


class Move(NamedTuple):
    """A change of basis of one stack."""

    old: Matrices
    new: Matrices
    columns: Matrices  # which old columns the new ones were, or None per dimension


def carry(
    path: KeyPath, leaf: Array, move: Move, first_moments: Sequence[str], reorder: bool
) -> Array:
    """A leaf of an inner state, of the shape of its stack, after a change of basis.

    Args:
      path: Of the leaf in that state.
      leaf: `[N, *block]`.
      move: The change of basis of the leaf's stack.
      first_moments: Names of the fields whose leaves are rotated by `Q_new^T Q_old`.
      reorder: Whether other leaves are permuted with the columns.
    """
    if _fields(path) & set(first_moments):
        moved = apply_matrices(apply_matrices(leaf, move.old), move.new, transpose=True)
        return moved.astype(leaf.dtype)
    return _permute(leaf, move.columns) if reorder else leaf


def _permute(x: Array, moved: Matrices) -> Array:
    """Each dimension k of a stack indexed by `moved[k]`, `[N, d]`."""
    for k, columns in enumerate(moved):
        if columns is not None:
            x = jnp.take_along_axis(x, along(columns, k, x.ndim), axis=k + 1)
    return x


def _fields(path: KeyPath) -> set[str]:
    return {k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)}


def _per_block(state: Any, params: Stacks) -> list[tuple[KeyPath, Array, Blocks]]:
    """Every leaf of a state that is about blocks, with its path and its stack of parameters."""
    stacks = {(jax.tree_util.DictKey(key),): b for key, b in params.items()}
    leaves = jax.tree_util.tree_leaves_with_path(state)
    owned = [(path, leaf, stack_of(path, stacks)) for path, leaf in leaves if leaf.ndim]
    return [(path, leaf, stacks[stack]) for path, leaf, stack in owned if stack is not None]


def check_elementwise(state: Any, params: Stacks) -> None:
    """Raises ValueError where a per-block state leaf does not have its block's shape."""
    for path, leaf, p in _per_block(state, params):
        if leaf.shape != p.update.shape:
            raise ValueError(
                f"the inner transformation keeps {jax.tree_util.keystr(path)} of shape "
                f"{leaf.shape} for blocks of shape {p.update.shape}: only elementwise "
                "transformations can run in an eigenbasis, factored ones cannot."
            )


def check_named(state: Any, params: Stacks, first_moments: Sequence[str]) -> None:
    """Raises ValueError where a name is no field of the per-block state."""
    if not params:
        return
    found = set().union(*(_fields(path) for path, _, _ in _per_block(state, params)))
    unknown = [name for name in first_moments if name not in found]
    if unknown:
        raise ValueError(
            f"first_moments names {unknown[0]!r}, which the inner transformation does not keep; it "
            f"keeps {sorted(found)}: name fields as a tuple of strings, or leave first_moments out."
        )
