"""Heavy-ball and Nesterov momentum with dampening."""

import jax
import optax

from shampoo_jax.base.options import check_options, check_range
from shampoo_jax.stacks.guard import in_float32


def momentum(
    decay: float | jax.Array, dampening: float | jax.Array = 0.0, nesterov: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Accumulates directions: `M = decay * M + (1 - dampening) * D`.

    The update is `M`, with `nesterov` it is `(1 - dampening) * D + decay * M`. Nothing is special
    about the first step: `M` starts from zero. This is `optax.trace` of `(1 - dampening) * D`, so
    with dampening 0 it is `optax.trace` itself, and with `dampening = decay` the uncorrected moving
    average. Weight decay that stands before it in a chain enters `M`, as in the reference.

    Args:
      decay: Of the accumulated direction, in [0, 1).
      dampening: Share of a new direction that is left out, in [0, 1).
      nesterov: Whether to look one step ahead.

    Returns:
      A transformation. Its state holds `M`, shaped like the parameters, in float32 or wider;
      updates keep their dtype.

    Raises:
      ValueError: `decay` or `dampening` outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from shampoo_jax import momentum
      >>> tx = momentum(0.5, dampening=0.25)
      >>> direction = jnp.array(4.0)
      >>> first, state = tx.update(direction, tx.init(direction))
      >>> second, state = tx.update(direction, state)
      >>> float(first), float(second)
      (3.0, 4.5)
    """
    check_range("decay", decay)
    check_options({"dampening": dampening, "nesterov": nesterov})
    return in_float32(optax.chain(optax.scale(1 - dampening), optax.trace(decay, nesterov)))
