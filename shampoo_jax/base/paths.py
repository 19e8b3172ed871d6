"""Whose state a leaf is, told from its path in the state, and where parts are in it."""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import jax

KeyPath = tuple[Any, ...]
Node = TypeVar("Node")


def name_of(path: KeyPath) -> str:
    """Components of a path joined by `/`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def as_written(path: KeyPath) -> KeyPath:
    """A path without what `optax.contrib.split_real_and_imaginary` appends to it.

    Both halves of a complex parameter go by its name: rules see them as they see real ones.

    >>> key = jax.tree_util.GetAttrKey
    >>> name_of(as_written((key("conv"), key("kernel"), key("imaginary"))))
    'conv/kernel'
    """
    last = path[-1] if path else None
    halves = isinstance(last, jax.tree_util.GetAttrKey) and last.name in ("real", "imaginary")
    return path[:-1] if halves else path


def check_named(tree: Any) -> None:
    """Raises ValueError for a mapping whose entries jax numbers: no rule could know their names.

    That is one registered as a pytree without keys, such as Haiku's FlatMapping.
    """
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_numbered):
        if _is_numbered(node):
            raise ValueError(
                f"parameters {name_of(path) or 'as a whole'} lie in a {type(node).__name__}, whose "
                "entries jax numbers instead of naming them: convert to dict, with Haiku "
                "haiku.data_structures.to_mutable_dict(params)."
            )


def _is_numbered(node: Any) -> bool:
    if not isinstance(node, Mapping):
        return False
    entries = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    return any(isinstance(k, jax.tree_util.FlattenedIndexKey) for path, _ in entries for k in path)


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
