"""Whose state a leaf is, told from its path in the state, and where parts are in it."""

from collections.abc import Collection
from typing import Any, TypeVar

import jax

KeyPath = tuple[Any, ...]
Node = TypeVar("Node")


def name_of(path: KeyPath) -> str:
    """Components of a path joined by `/`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def nodes_of(kind: type[Node], tree: Any) -> list[tuple[KeyPath, Node]]:
    """All nodes of a type with their paths, the outermost where they are nested."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, kind))
    return [(path, x) for path, x in found if isinstance(x, kind)]


def parameter_of(path: KeyPath, parameters: Collection[KeyPath]) -> KeyPath | None:
    """The parameter whose path is the longest end of a leaf's path, or None.

    The longest, since parameters `w` and `z/w` both end the path of the moments of `z/w`. So all
    parameters have to be given, not only those of interest.
    """
    return next((path[i:] for i in range(len(path) + 1) if path[i:] in parameters), None)


def stack_of(path: KeyPath, stacks: Collection[KeyPath]) -> KeyPath | None:
    """The stack of blocks whose path stands within a leaf's path, or None.

    More may follow it, the dimension of a factor say. Where several fit, one directly behind a
    field of the state counts most, then the longest, then the one closest to the leaf: positions in
    chains and numbers of dimensions look like paths of parameters that are kept in tuples.
    """
    found = [
        (i > 0 and isinstance(path[i - 1], jax.tree_util.GetAttrKey), len(stack), i, stack)
        for stack in stacks
        for i in range(len(path) - len(stack) + 1)
        if path[i : i + len(stack)] == stack
    ]
    return max(found, key=lambda match: match[:3])[3] if found else None
