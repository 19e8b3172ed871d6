"""An inner state when the basis it lives in changes: what is carried along, what cannot be."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shampoo_jax.base.paths import KeyPath, stack_of
from shampoo_jax.blocks.blocks import Matrices, Stacks, along
from shampoo_jax.matrix.products import apply_matrices

Array = jax.Array
Replace = Callable[[dict[str, dict[KeyPath, Array]]], Any]


class Move(NamedTuple):
    """A change of basis of one stack."""

    old: Matrices
    new: Matrices
    columns: Matrices  # which old columns the new ones were, `[N, d]`, where leaves are to follow


def carry(path: KeyPath, leaf: Array, move: Move, first_moments: Sequence[str]) -> Array:
    """A leaf of an inner state, of the shape of its stack, after a change of basis.

    Args:
      path: Of the leaf in that state.
      leaf: `[N, *block]`.
      move: The change of basis of the leaf's stack.
      first_moments: Names of the fields whose leaves are rotated by `Q_new^T Q_old`; all others
        are permuted with the columns.
    """
    if _fields(path) & set(first_moments):
        moved = apply_matrices(apply_matrices(leaf, move.old), move.new, transpose=True)
        return moved.astype(leaf.dtype)
    for k, columns in enumerate(move.columns):
        if columns is not None:
            leaf = jnp.take_along_axis(leaf, along(columns, k, leaf.ndim), axis=k + 1)
    return leaf


def _fields(path: KeyPath) -> set[str]:
    return {k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)}


def per_stack(state: Any, stacks: Stacks) -> tuple[dict[str, dict[KeyPath, Array]], Replace]:
    """The leaves of a state that are about blocks, by stack and by their paths in the state.

    Args:
      state: Of any transformation of these stacks.
      stacks: Only their names count.

    Returns:
      The leaves, and a function of such leaves giving the state with them in their places.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    names = [(jax.tree_util.DictKey(key),) for key in stacks]
    found: dict[str, dict[KeyPath, Array]] = {key: {} for key in stacks}
    for path, leaf in leaves:
        name = stack_of(path, names) if jnp.ndim(leaf) else None
        if name is not None:
            found[name[0].key][path] = leaf

    def replace(new: dict[str, dict[KeyPath, Array]]) -> Any:
        changed = {path: leaf for own in new.values() for path, leaf in own.items()}
        return structure.unflatten([changed.get(path, leaf) for path, leaf in leaves])

    return found, replace


def check_inner(state: Any, params: Stacks, first_moments: Sequence[str]) -> None:
    """Raises ValueError where the state of an inner transformation cannot follow its blocks.

    That is where a leaf does not have the shape of its blocks, or a name is that of no field.
    """
    fields = set()
    for key, leaves in per_stack(state, params)[0].items():
        shape = params[key].update.shape
        for path, leaf in leaves.items():
            fields |= _fields(path)
            if leaf.shape != shape:
                raise ValueError(
                    f"the inner transformation keeps {jax.tree_util.keystr(path)} of shape "
                    f"{leaf.shape} for blocks of shape {shape}: only elementwise "
                    "transformations can run in an eigenbasis, factored ones cannot."
                )
    unknown = [name for name in first_moments if name not in fields]
    if unknown and params:
        raise ValueError(
            f"first_moments names {unknown[0]!r}, which the inner transformation does not keep; it "
            f"keeps {sorted(fields)}: name some as a tuple of strings, or leave first_moments out."
        )
