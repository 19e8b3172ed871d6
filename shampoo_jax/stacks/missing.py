"""Gradients that are None: zeros on the way in, the old state and None on the way out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shampoo_jax.base.paths import KeyPath, name_of, parameter_of
from shampoo_jax.stacks.incoming import trained

Paths = frozenset[KeyPath]
Owns = Callable[[Any], bool]  # whether a state was made for these parameters


def fill_missing(updates: Any, params: Any, owns: Owns) -> tuple[Any, Paths, Any]:
    """Zeros for gradients that are None, whose they are, and the parameters that are trained."""
    if params is None:
        return updates, frozenset(), None
    (gradients, given), (weights, wanted) = jax.tree.flatten(updates), jax.tree.flatten(params)
    alike = given == wanted and [*map(np.shape, gradients)] == [*map(np.shape, weights)]
    return (updates, frozenset(), params) if alike else _matched(updates, params, owns)


def _matched(updates: Any, params: Any, owns: Owns) -> tuple[Any, Paths, Any]:
    """`fill_missing` by paths: trees of other containers, missing gradients, and complaints."""
    given = dict(jax.tree_util.tree_leaves_with_path(updates, is_leaf=lambda x: x is None))
    params = _without_strangers(trained(params), given, owns)
    wanted = dict(jax.tree_util.tree_leaves_with_path(params))
    absent = frozenset(path for path in wanted if path in given and given[path] is None)
    present = {path: x for path, x in given.items() if x is not None}
    for path in [*(p for p in wanted if p not in absent), *present]:
        shapes = [np.shape(x[path]) if path in x else None for x in (wanted, present)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"parameter {name_of(path)!r} has shape {shapes[0]}, its gradient {shapes[1]} "
                "(None: there is none of this name): pass gradients and parameters of one tree, "
                "and None for a gradient that is missing."
            )
    if not absent:
        return updates, absent, params
    leaves = [jnp.zeros_like(p) if q in absent else present[q] for q, p in wanted.items()]
    return jax.tree.structure(params).unflatten(leaves), absent, params


def _without_strangers(params: Any, gradients: dict[KeyPath, Any], owns: Owns) -> Any:
    """The parameters without the plain numbers that have neither a gradient nor a state.

    A whole Equinox module holds such, and its arrays alone have been given to `init`.
    """
    plain = {
        path
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if isinstance(x, float | np.generic) and gradients.get(path) is None
    }
    if not plain or owns(params):
        return params
    return jax.tree_util.tree_map_with_path(lambda p, x: None if p in plain else x, params)


def drop(updates: Any, absent: Paths) -> Any:
    """None again where the update was missing."""
    return jax.tree_util.tree_map_with_path(lambda p, x: None if p in absent else x, updates)


def restore(new: Any, old: Any, params: Any, absent: Paths) -> Any:
    """The new state, but the old leaves of parameters without a gradient.

    A leaf belongs to the parameter that `parameter_of` names if it has its shape.
    """
    shapes = {p: np.shape(x) for p, x in jax.tree_util.tree_leaves_with_path(params)}

    def choose(path: KeyPath, new_leaf: Any, old_leaf: Any) -> Any:
        owner = parameter_of(path, shapes)
        belongs = owner in absent and np.shape(new_leaf) == shapes[owner]
        return old_leaf if belongs else new_leaf

    return jax.tree_util.tree_map_with_path(choose, new, old)
