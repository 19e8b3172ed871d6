"""Updates scaled by a rule of parameters."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from shampoo_jax.base.options import check_options, is_number
from shampoo_jax.base.paths import KeyPath, name_of


def scale_per_parameter(rule: Callable[[KeyPath, Any], float]) -> optax.GradientTransformation:
    """Multiplies the update of each parameter by what a rule says: learning rates per parameter.

    `u <- rule(path, u) * u`. In a chain behind a complete optimizer it scales its steps, decay
    included; before one it scales gradients, to which most directions here are indifferent.

    Args:
      rule: Function of the key path and the update, an array of the parameter's shape, giving a
        number; paths are those of `jax.tree_util.tree_map_with_path`.

    Returns:
      A stateless transformation; updates keep their dtype, None stays None.

    Raises:
      ValueError: In `update`, a rule that gives no finite number.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> rule = lambda path, leaf: leaf.shape[0] ** -0.5 if leaf.ndim > 1 else 1.0
      >>> tx = shampoo_jax.shampoo(0.1, others_rate=1.0)
      >>> tx = optax.chain(tx, shampoo_jax.scale_per_parameter(rule))
      >>> params = {"w": jnp.zeros((4, 4)), "b": jnp.zeros(4)}
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> updates["w"][0].round(3).tolist(), updates["b"].round(3).tolist()
      ([-0.05, -0.05, -0.05, -0.05], [-0.1, -0.1, -0.1, -0.1])
    """
    check_options({"rule": rule})

    def scale(path: KeyPath, update: jax.Array) -> jax.Array:
        factor = rule(path, update)
        traced = isinstance(factor, jax.Array | np.ndarray) and factor.ndim == 0
        if not traced and not (is_number(factor) and math.isfinite(factor)):
            raise ValueError(
                f"rule gives {factor!r} for {name_of(path)!r}: a finite number is needed."
            )
        return (factor * update).astype(update.dtype)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))
