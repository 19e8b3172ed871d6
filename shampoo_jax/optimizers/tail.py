"""The average of a run's last weights, to be evaluated in their place."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import UP_TO_ONE, Number, WholeNumber
from shampoo_jax.base.paths import KeyPath, as_written
from shampoo_jax.optimizers.hyperball import wide
from shampoo_jax.optimizers.routing import Rule

Array = jax.Array
TAU = Number(
    lambda x: x >= 1, "must be at least 1", "1 keeps the newest, math.inf the first weights"
)


class TailAverageState(NamedTuple):
    """State of `tail_average`."""

    count: Array  # int32[], steps taken
    share: Array  # float[], read again by `eval_params`
    begun: Array  # bool[], whether there is an average yet
    mean: Any  # in float32 or wider, like the parameters; `optax.MaskedNode` where not averaged

    def evaluated(self, params: Any) -> Any:
        """`(1 - share) W + share E` once there is an E."""

        def mixed(mean: Any, p: Array) -> Array:
            if isinstance(mean, optax.MaskedNode):
                return p
            w = wide(p)
            mix = (1 - self.share) * w + self.share * mean
            return jnp.where(self.begun, mix, w).astype(p.dtype)

        masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
        return jax.tree.map(mixed, self.mean, params, is_leaf=masked)


def tail_average(
    start: int,
    tau: float = 150.0,
    share: float | Array = 0.6,
    *,
    end: int | None = None,
    averaged: Rule | None = None,
) -> optax.GradientTransformation:
    """Averages the weights of a run's tail; training takes no notice of it.

    After step `start`, counted from 1, `E = W`; after each later one `E += (W - E) / tau`. What to
    evaluate is `(1 - share) W + share E`, see `eval_params`; until then it is W. With
    `tau=math.inf` E stays what it was: a reference, and one evaluates between it and the newest
    weights.

    To be placed behind the learning rate, and before `ema_nesterov`, whose move ahead is no part of
    the weights.

    Args:
      start: Steps after which the average begins.
      tau: Steps that it is over.
      share: Of the average in what is evaluated, in [0, 1].
      end: Steps from which on the average stays as it is; None means for ever.
      averaged: Callable of (path, leaf): whether a parameter is averaged; None means all are.

    Returns:
      A transformation that needs `params` and hands updates on as they are. Its state holds E in
      float32 or wider.

    Raises:
      ValueError: Steps that are no whole numbers from 1 on, `tau` below 1, a share outside [0, 1].

    Source: modded-nanogpt track 3, results #45 (start 2000) and #46 (start 2400), without the
    embedding.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> tx = optax.chain(optax.sgd(1.0), tail_average(1, tau=4.0, share=0.5))
      >>> params = jnp.array(10.0)
      >>> state = tx.init(params)
      >>> for gradient in (1.0, 4.0):  # to 9 and to 5; E is 9 and then 8
      ...     updates, state = tx.update(jnp.array(gradient), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(params), float(shampoo_jax.eval_params(state, params))
      (5.0, 6.5)
    """
    WholeNumber("2000, say")("start", start)
    if end is not None:
        WholeNumber("None means for ever", least=start)("end", end)
    TAU("tau", tau)
    UP_TO_ONE("share", share)

    def init(params: Any) -> TailAverageState:
        def first(path: KeyPath, p: Array) -> Any:
            own = averaged is None or averaged(as_written(path), p)
            # A copy: state and parameters may both be donated.
            return jnp.array(wide(jnp.asarray(p)), copy=True) if own else optax.MaskedNode()

        mean = jax.tree_util.tree_map_with_path(first, params)
        return TailAverageState(
            jnp.zeros([], jnp.int32), jnp.asarray(share, float), jnp.array(False), mean
        )

    def update(updates: Any, state: TailAverageState, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("tail_average needs the parameters: update(updates, state, params).")
        count = optax.safe_increment(state.count)
        grows = count > start if end is None else (count > start) & (count < end)
        rate = jnp.where(grows, 1 / tau, 0.0)

        def follow(u: Array | None, p: Array, mean: Any) -> Any:
            if u is None or isinstance(mean, optax.MaskedNode):
                return mean
            new = wide(p) + wide(u)
            # Exactly the weights up to `start`, also of what has no gradient in that very step.
            return jnp.where(count <= start, new, mean + (rate * (new - mean)).astype(mean.dtype))

        leaves, structure = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
        trees = map(structure.flatten_up_to, (params, state.mean))
        mean = structure.unflatten([follow(*leaf) for leaf in zip(leaves, *trees, strict=True)])
        kept = jnp.asarray(share, float)
        return updates, TailAverageState(count, kept, count >= start, mean)

    return optax.GradientTransformation(init, update)
