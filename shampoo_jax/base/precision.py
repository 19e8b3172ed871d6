"""Arithmetic in float32 or wider around trees of narrower arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def check_dtype(name: str, dtype: Any) -> None:
    """Raises ValueError for a storage dtype that is not None, bfloat16, float32 or float64."""
    if dtype is not None and jnp.dtype(dtype).name not in ("bfloat16", "float32", "float64"):
        raise ValueError(
            f"{name}={jnp.dtype(dtype).name}: use bfloat16 or float32; narrower ranges overflow."
        )


def check_real(path: tuple[Any, ...], leaf: Any) -> None:
    """Raises ValueError for a complex parameter, given with its key path."""
    if np.iscomplexobj(leaf):
        raise ValueError(
            f"parameter {jax.tree_util.keystr(path)} is complex ({leaf.dtype}): Shampoo's factors "
            "are real. Wrap the transformation in optax.contrib.split_real_and_imaginary."
        )


def widen(tree: Any) -> Any:
    """Casts every array to float32, or leaves it in its wider dtype."""

    def one(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    return jax.tree.map(one, tree)


def cast_like(tree: Any, like: Any) -> Any:
    """Casts every array of `tree` to the dtype of its counterpart in `like`."""
    return jax.tree.map(lambda x, y: x.astype(jnp.asarray(y).dtype), tree, like)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` in float32 or wider, with its state, and returns updates in the incoming dtype.

    Stock parts add an array-valued hyperparameter times a bfloat16 array in float32 and hand that
    on, so both updates and state change dtype after the first step; here they keep it.

    Args:
      inner: Any Optax transformation.

    Returns:
      The transformation.
    """
    tx = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return tx.init(widen(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        wide = None if params is None else widen(params)
        new, state = tx.update(widen(updates), state, wide, **extra)
        return cast_like(new, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
