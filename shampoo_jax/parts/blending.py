"""Blends of an update and what a direction makes of it, with the size of the update kept."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import UP_TO_ONE, check_choice, check_range, check_transform
from shampoo_jax.blocks.blocks import Blocks, Part, Stacks, each, make_part, norms
from shampoo_jax.matrix.orthogonalize import schatten4_norm

Array = jax.Array
Share = Callable[[Array, Blocks, Array], Array]  # of the step, the blocks and what was made of them
SHARE_OR_SCHEDULE = dataclasses.replace(UP_TO_ONE, schedule=True)


class BlendState(NamedTuple):
    """State of `blend` and `trust_gate`."""

    count: Array  # int32[], steps taken
    direction: Any


def blend(
    direction: optax.GradientTransformation,
    share: float | Array | optax.Schedule = 1.0,
    *,
    norm: Literal["frobenius", "schatten4"] = "schatten4",
) -> Part:
    """Mixes what a direction makes of each block's update with the update itself, at its size.

    With R the update so far, D that of `direction`, scaled to the norm of R, and k the share:
    `update = (R + k (D - R)) * |R| / |R + k (D - R)|`. Where D or the mix is 0, or the
    direction's preconditioner is not ready, the update stays R.

    Args:
      direction: Part of `Blocks`, such as `eigenbasis(...)`; a stock Optax transformation is lifted
        by `on_updates` first.
      share: k in [0, 1], or a schedule of it, of the step counted from 0.
      norm: `"schatten4"`, the fourth root of the sum of the singular values' fourth powers, or
        `"frobenius"`.

    Returns:
      A part. Source: modded-nanogpt track 3, results #44 to #46.

    Raises:
      ValueError: A share outside [0, 1], an unknown norm, a direction that is none.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> tx = blend(shampoo_jax.on_updates(optax.scale_by_sign()), 0.5, norm="frobenius")
      >>> g = jnp.array([3.0, -4.0])  # its signs, at the same norm: 3.54
      >>> tx.update(g, tx.init(g))[0].round(2).tolist()
      [3.28, -3.78]
    """
    SHARE_OR_SCHEDULE("share", share)

    def constant(count: Array, b: Blocks, made: Array) -> Array:
        return jnp.broadcast_to(jnp.asarray(_at(share, count), made.dtype), len(made))

    return _blended(direction, constant, norm)


def trust_gate(
    direction: optax.GradientTransformation,
    least: float = 0.2,
    *,
    floor: float | Array | optax.Schedule = 0.0,
    cap: float | Array | optax.Schedule = 1.0,
    norm: Literal["frobenius", "schatten4"] = "schatten4",
) -> Part:
    """`blend` with a share for each block that says how far a direction is to be trusted.

    With R the update so far, D the direction's and G the raw gradient, the share is
    `clip((cos(D, R) - least) / (1 - least), 0, 1) * clip(cos(D, G) / cos(R, G), 0, 1)`, then at
    least `floor` and at most `cap`. Cosines with 0 are 0; none depends on the size of gradients.

    Args:
      direction: Part of `Blocks`, see `blend`.
      least: Cosine in [0, 1) up to which a direction is not trusted.
      floor: Least share, in [0, 1], or a schedule of it, of the step counted from 0.
      cap: Largest share, likewise.
      norm: What is kept, see `blend`.

    Returns:
      A part; it reports its share as the figure `"gate"`. Source: modded-nanogpt track 3, results
      #44 to #46, with `least` 0.2 and, in the first half, floor 0.45 and cap 0.85.

    Raises:
      ValueError: A number out of its range, an unknown norm, a direction that is none.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> uphill = trust_gate(shampoo_jax.on_updates(optax.scale(-1.0)), floor=0.25)
      >>> g = jnp.array([3.0, -4.0])
      >>> uphill.update(g, uphill.init(g))[0].round(4).tolist()  # half of it, at its old norm
      [3.0, -4.0]
    """
    check_range("least", least)
    SHARE_OR_SCHEDULE("floor", floor)
    SHARE_OR_SCHEDULE("cap", cap)

    def gate(count: Array, b: Blocks, made: Array) -> Array:
        raw = _cosine(b.update, b.gradient)
        agreement = jnp.clip((_cosine(made, b.update) - least) / (1 - least), 0, 1)
        # Where R does not climb at all nothing of D does relative to it, or all of it.
        quotient = _cosine(made, b.gradient) / jnp.maximum(raw, 1e-8)
        found = agreement * jnp.clip(quotient, 0, 1)
        return jnp.minimum(jnp.maximum(found, _at(floor, count)), _at(cap, count))

    return _blended(direction, gate, norm)


def _blended(direction: optax.GradientTransformation, share: Share, norm: str) -> Part:
    check_choice("norm", norm, ("frobenius", "schatten4"))
    check_transform("direction", direction)
    tx = optax.with_extra_args_support(direction)
    size = norms if norm == "frobenius" else _schatten4

    def init(params: Stacks) -> BlendState:
        return BlendState(jnp.zeros([], jnp.int32), tx.init(params))

    def update(stacks: Stacks, old: BlendState, params: Any, **extra: Any) -> tuple[Stacks, Any]:
        made, state = tx.update(stacks, old.direction, params, **extra)
        one = functools.partial(_mix, old.count, share, size)
        count = optax.safe_increment(old.count)
        return each(one, made, stacks), BlendState(count, state)

    return make_part(init, update)


def _mix(
    count: Array, share: Share, size: Callable[[Array], Array], made: Blocks, b: Blocks
) -> Any:
    raw = b.update
    wanted = size(raw)
    at_size = functools.partial(_at_size, wanted=wanted, size=size)
    d, moves = at_size(made.update)
    k = share(count, b, d).astype(raw.dtype)
    per_block = _per_block(k, raw)
    # All of D is D itself: through the difference its small singular values would be lost.
    mixed, left = at_size(jnp.where(per_block == 1, d, raw + per_block * (d - raw)))
    used = _per_block(made.ready & moves & left, raw)
    update = jnp.where(used, mixed, raw)
    return dataclasses.replace(made, update=update, figures={**made.figures, "gate": k})


def _at_size(x: Array, wanted: Array, size: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Blocks scaled to norms `[N]`, and which of them are not 0."""
    found = size(x)
    ratio = jnp.where(found > 0, wanted / jnp.where(found > 0, found, 1.0), 0.0)
    return x * _per_block(ratio, x), found > 0


def _cosine(x: Array, y: Array) -> Array:
    """Cosines `[N]` of blocks, 0 where one of them is 0; free of overflow."""
    lengths = norms(x), norms(y)
    x, y = (
        v / _per_block(jnp.where(n > 0, n, 1.0), v) for v, n in zip((x, y), lengths, strict=True)
    )
    return jnp.sum(x * y, axis=tuple(range(1, x.ndim)))


def _schatten4(x: Array) -> Array:
    """Norms `[N]` of blocks as matrices of their first dimension and the rest."""
    columns = x.reshape(*x.shape[:2], -1) if x.ndim > 1 else x[:, None, None]
    return schatten4_norm(columns)


def _per_block(x: Array, like: Array) -> Array:
    return x.reshape(-1, *[1] * (like.ndim - 1))


def _at(value: Any, count: Array) -> Any:
    return value(count) if callable(value) else value
