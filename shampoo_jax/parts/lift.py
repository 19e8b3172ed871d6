"""Stock Optax transformations as parts: of updates, of gradients, from gradients."""

import dataclasses
from typing import Any

import optax

from shampoo_jax.base.options import check_options
from shampoo_jax.blocks.blocks import Part, Stacks, each, make_part


def on_updates(inner: optax.GradientTransformation) -> Part:
    """Lifts any Optax transformation onto `Blocks.update`: what the next part will divide or scale.

    Args:
      inner: Transformation of trees of arrays; it sees stacks `[N, *block]`.

    Returns:
      A part to be placed between two parts of the walk.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> tx = optax.chain(
      ...     shampoo_jax.filter_gradient(), on_updates(optax.clip(1.0)), shampoo_jax.precondition()
      ... )
      >>> updates, _ = tx.update(jnp.array([3.0, 0.5]), tx.init(jnp.zeros(2)))
      >>> updates.tolist()
      [1.0, 0.5]
    """
    return _lifted(inner, "update", "update")


def on_gradients(inner: optax.GradientTransformation) -> Part:
    """Lifts any Optax transformation onto `Blocks.gradient`: what later statistics will read.

    Args:
      inner: Transformation of trees of arrays; it sees stacks `[N, *block]`.

    Returns:
      A part to be placed between two parts of the walk.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> moment = shampoo_jax.scale_by_second_moment()
      >>> tx = shampoo_jax.blocked(optax.chain(on_gradients(optax.clip(1.0)), moment))
      >>> grads = {"w": jnp.array([3.0, 0.5])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["w"].tolist()  # 3 divided by the moment of the clipped gradient, 1
      [3.0, 1.0]
    """
    return _lifted(inner, "gradient", "gradient")


def from_gradients(inner: optax.GradientTransformation) -> Part:
    """Replaces `Blocks.update` by what any Optax transformation makes of the raw gradient.

    This is how a stock transformation serves as the magnitude of `graft`.

    Args:
      inner: Transformation of trees of arrays; it sees stacks `[N, *block]`.

    Returns:
      A part.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> tx = optax.chain(on_updates(optax.scale(9.0)), from_gradients(optax.scale_by_sign()))
      >>> tx = shampoo_jax.blocked(tx)
      >>> grads = {"w": jnp.array([3.0, -0.5])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["w"].tolist()
      [1.0, -1.0]
    """
    return _lifted(inner, "gradient", "update")


def of_updates(part: optax.GradientTransformation) -> Part:
    """Lets a statistic read the update in the making where it would read the raw gradient.

    Behind a first moment these are factors or second moments of the momentum: #18 of
    modded-nanogpt's track 3 has such factors, #44 such second moments.

    Args:
      part: Part of stacks, such as `accumulate_factors` or `scale_by_second_moment`.

    Returns:
      A part; gradients are handed on as they came.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> moment = of_updates(shampoo_jax.scale_by_second_moment(0.0))
      >>> tx = shampoo_jax.blocked(optax.chain(on_updates(optax.scale(9.0)), moment))
      >>> grads = {"w": jnp.array([3.0, -0.5])}
      >>> tx.update(grads, tx.init(grads))[0]["w"].tolist()
      [1.0, -1.0]
    """
    check_options({"inner": part})
    tx = optax.with_extra_args_support(part)

    def update(stacks: Stacks, state: Any, params: Any, **extra: Any) -> tuple[Stacks, Any]:
        given = each(lambda b: dataclasses.replace(b, gradient=b.update), stacks)
        new, state = tx.update(given, state, params, **extra)
        return each(lambda n, b: dataclasses.replace(n, gradient=b.gradient), new, stacks), state

    return make_part(tx.init, update)


def _lifted(inner: optax.GradientTransformation, source: str, target: str) -> Part:
    check_options({"inner": inner})
    tx = optax.with_extra_args_support(inner)

    def take(stacks: Any, field: str) -> dict[str, Any]:
        return each(lambda b: getattr(b, field), stacks)

    def init(params: Stacks) -> Any:
        return tx.init(take(params, "update"))

    def update(stacks: Stacks, state: Any, params: Any, **extra: Any) -> tuple[Stacks, Any]:
        weights = None if params is None else take(params, "update")
        arrays, state = tx.update(take(stacks, source), state, weights, **extra)
        return each(lambda b, x: dataclasses.replace(b, **{target: x}), stacks, arrays), state

    return make_part(init, update)
