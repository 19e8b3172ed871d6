"""Weight decay as one factor, as the benchmark's scripts have it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class FactorDecayState(NamedTuple):
    """State of `decay_by_factor`."""

    count: jax.Array  # int32 scalar: updates so far


def decay_by_factor(
    rate: optax.Schedule, decay_of: Callable[[optax.Params], Any]
) -> optax.GradientTransformation:
    """Decay of a finished step: p <- p * (1 - rate(s) * decay) + step.

    The factor is rounded to float32 as one number. Where it is that of 5e-4, this rounding moves
    every norm by 2e-8 a step, which `optax.add_decayed_weights` does not.

    Args:
        rate: Learning rate at every step.
        decay_of: Function of the parameters; its tree is a number for each.

    Returns:
        Optax transformation of steps that are added to parameters.

    Example:
        >>> tx = decay_by_factor(lambda step: 0.5, lambda params: {"w": 0.5})
        >>> p = {"w": jnp.float32(4.0)}
        >>> float(tx.update({"w": jnp.float32(0.25)}, tx.init(p), p)[0]["w"])
        -0.75
    """

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params=None: decay is of parameters, give them to update.")
        now = rate(state.count)

        def decayed(step: jax.Array, p: jax.Array, decay: float) -> jax.Array:
            wide = p.astype(step.dtype)
            return step + (wide * (1 - now * decay) - wide)

        count = optax.safe_increment(state.count)
        return jax.tree.map(decayed, updates, params, decay_of(params)), FactorDecayState(count)

    return optax.GradientTransformation(
        lambda _: FactorDecayState(jnp.zeros([], jnp.int32)), update
    )
