"""Gradients, parameters and states that no optimizer can use, refused with the leaf's name."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.paths import name_of

DOUBLE = jnp.dtype("float64")
# Of gradients that need no further look.
USUAL = frozenset(map(jnp.dtype, ("float32", "bfloat16", "float16", "float64")))


def check_arrays(tree: Any, kind: str, *, whole: bool = False) -> None:
    """Raises ValueError for a leaf that is no floating point number of 16 bits or more.

    Args:
      tree: Gradients or parameters.
      kind: What they are, for the message.
      whole: Whether integers pass: a parameter that has no gradient may be one.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if getattr(leaf, "dtype", None) in USUAL:
            continue
        try:
            dtype = jnp.result_type(leaf)
        except (TypeError, ValueError):  # float0, a string, any object
            dtype = getattr(leaf, "dtype", type(leaf).__name__)
        if dtype == jax.dtypes.float0:
            dtype = "float0"
        numbers = isinstance(dtype, jnp.dtype) and jnp.issubdtype(dtype, jnp.number)
        inexact = numbers and jnp.issubdtype(dtype, jnp.inexact)
        if inexact and jnp.finfo(dtype).bits < 16:
            raise ValueError(
                f"{kind} {name_of(path)!r} has dtype {dtype}, which nothing promotes: cast it to "
                "bfloat16 or float32."
            )
        if not (inexact or (whole and numbers)):
            raise ValueError(
                f"{kind} {name_of(path)!r} has dtype {dtype}, no floating point number: give None "
                "for the gradient of what is not trained, or leave it out by optax.partition."
            )


def check_gradients(updates: Any, further: Any) -> None:
    """`check_arrays` of gradients, and of the trees by name that come with them."""
    check_arrays(updates, "gradient")
    if not isinstance(further, Mapping):
        raise ValueError(
            f"further={type(further).__name__}: give a mapping, {{name: tree like the gradients}}."
        )
    for name, tree in further.items():
        check_arrays(tree, f"further[{name!r}]")


def trained(tree: Any) -> Any:
    """The parameters, with None for what nothing can train.

    That are integers, flags, keys of random numbers, functions: leaves of a whole Equinox module.
    """
    return jax.tree.map(lambda x: x if _inexact(x) else None, tree)


def _inexact(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        return isinstance(x, float | complex)
    return jnp.issubdtype(dtype, jnp.inexact)


def check_state(state: Any, updates: Any) -> None:
    """Raises ValueError for a state that no guard made, or that is too narrow for a gradient."""
    if not isinstance(state, optax.ApplyIfFiniteState):
        raise ValueError(
            f"state is of type {type(state).__name__}: give what init of this transformation, or "
            "its last update, returned."
        )
    wide = [
        path
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
        if getattr(leaf, "dtype", None) == DOUBLE
    ]
    if wide and jnp.result_type(float) == DOUBLE:  # elsewhere they are narrowed
        held = {x.dtype for x in jax.tree.leaves(state.inner_state)}
        if DOUBLE not in held and len(held - {jnp.dtype("int32")}) > 0:
            raise ValueError(
                f"gradient {name_of(wide[0])!r} has dtype float64, the state was made for narrower "
                "parameters: cast gradients to float32, or parameters to float64 before init."
            )
