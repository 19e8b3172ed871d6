"""EMA-Nesterov: gradients are taken ahead of the parameters, along the average of their steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import RATE, check_range
from shampoo_jax.optimizers.hyperball import wide
from shampoo_jax.optimizers.weight_decay import ScalarOrSchedule, value_at

Array = jax.Array


class EmaNesterovState(NamedTuple):
    """State of `ema_nesterov`."""

    count: Array  # int32[], steps taken
    last: Any  # parameters after the last step, before they were moved ahead; like the parameters
    mean: Any  # moving average of their steps, in the dtypes of the parameters

    def evaluated(self, params: Any) -> Any:
        """`last`, for parameters that are masked the given ones."""
        own = lambda last, p: p if isinstance(last, optax.MaskedNode) else last.astype(p.dtype)  # noqa: E731
        return jax.tree.map(own, self.last, params, is_leaf=_is_masked)


def ema_nesterov(
    lookahead: ScalarOrSchedule, decay: float | Array = 0.99
) -> optax.GradientTransformation:
    """Moves all parameters ahead, along the average of their past steps, for the next gradient.

    With D the step that the chain has made of the gradient at the parameters P that the caller
    holds, which lie ahead:

      `W' = P + D`, `B <- decay B + (1 - decay) (W' - W)`, `W <- W'`, `P <- W + a B`.

    Nothing is taken back: what a parameter was moved ahead counts as part of its step. The weights
    W are what to evaluate, see `eval_params`; where a is 0 they are the parameters themselves.

    To be placed last in a chain, behind the learning rate, and around everything `guard(...)`,
    which leaves all of it as it was where a gradient is missing or not finite.

    Args:
      lookahead: `a` of the step, counted from 0, whose gradient is taken there: number or schedule.
        The first has no effect.
      decay: Of the average of steps, in [0, 1).

    Returns:
      A transformation that needs `params`. Its state holds W and B in the dtypes of the parameters,
      to which W and P are rounded as they are stored.

    Raises:
      ValueError: A negative `lookahead`, a decay outside [0, 1), missing params.

    Source: modded-nanogpt track 3, results #44 to #46: 0.3 of the scheduled rate's share, 0.99.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> tx = optax.chain(optax.sgd(1.0), ema_nesterov(2.0, decay=0.5))
      >>> params = jnp.array(4.0)
      >>> updates, state = tx.update(jnp.array(1.0), tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> float(params), float(shampoo_jax.eval_params(state, params))  # B is -0.5
      (2.0, 3.0)
    """
    RATE("lookahead", lookahead)
    check_range("decay", decay)

    def init(params: Any) -> EmaNesterovState:
        # A copy: state and parameters may both be donated.
        last = jax.tree.map(lambda p: jnp.array(p, copy=True), params)
        return EmaNesterovState(
            jnp.zeros([], jnp.int32), last, jax.tree.map(jnp.zeros_like, params)
        )

    def update(updates: Any, state: EmaNesterovState, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("ema_nesterov needs the parameters: update(updates, state, params).")
        count = optax.safe_increment(state.count)
        ahead = value_at(lookahead, count)

        def move(u: Array | None, p: Array, last: Array, mean: Array) -> tuple[Any, Array, Array]:
            if u is None:
                return None, last, mean
            # Of what the caller holds in bfloat16 a copy in float32 may be given: see the state's.
            ended = (wide(p) + wide(u)).astype(last.dtype)
            step = wide(ended) - wide(last)
            new = (decay * wide(mean) + (1 - decay) * step).astype(mean.dtype)
            held = (wide(ended) + ahead * wide(new)).astype(last.dtype)
            return (wide(held) - wide(p)).astype(u.dtype), ended, new

        leaves, structure = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
        trees = map(structure.flatten_up_to, (params, state.last, state.mean))
        moved = [move(*leaf) for leaf in zip(leaves, *trees, strict=True)]
        updates, last, mean = (structure.unflatten([m[i] for m in moved]) for i in range(3))
        return updates, EmaNesterovState(count, last, mean)

    return optax.GradientTransformation(init, update)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
