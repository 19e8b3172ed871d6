"""Schedules of rates and of momentum, as the benchmark's records have them."""

import jax.numpy as jnp
import optax

from shampoo_jax.base.options import NOT_NEGATIVE, POSITIVE, check_range


def power_cool(
    peak: float, end: float, cooldown: float | None = None, power: float = 1.0, final: float = 0.0
) -> optax.Schedule:
    """A rate that is flat, then falls as a power of the steps left: PowerCool, power decay.

    `peak * (final + (1 - final) * min(1, (end - t) / cooldown)^power)`, and `peak * final` from
    step `end` on. With `cooldown = end` it falls from the beginning, with power 1 along a line.

    Args:
      peak: The flat part's value.
      end: Step at which the fall ends; a run may end before.
      cooldown: Steps of the fall; None means all of them, 0 none.
      power: Exponent of the line, positive.
      final: Last value as a share of the first, not negative.

    Returns:
      A schedule of the step, counted from 0.

    Raises:
      ValueError: Steps or a power that are not positive, a negative cooldown or share.

    Sources: modded-nanogpt track 3, results #25 (power 1.5 over all steps, final 0.017) and #44
    (power 1.2 over the last 2386.4 of 2900 steps).

    Example:
      >>> rate = power_cool(2.0, end=8, cooldown=4, power=2.0)
      >>> [float(rate(t)) for t in (0, 4, 6, 9)]
      [2.0, 2.0, 0.5, 0.0]
    """
    cooldown = end if cooldown is None else cooldown
    for name, value in (("end", end), ("power", power)):
        POSITIVE.but("steps or an exponent")(name, value)
    NOT_NEGATIVE.but("None means all steps")("cooldown", cooldown)
    NOT_NEGATIVE.but("0 is none")("final", final)

    def schedule(count):
        left = end - _wide(count)
        line = jnp.clip(left / cooldown, 0.0, 1.0) if cooldown else jnp.where(left > 0, 1.0, 0.0)
        line = line if power == 1 else line**power
        return peak * (line if final == 0 else final + (1 - final) * line)

    return schedule


def rise_and_fall(
    low: float, high: float, *, warmup: float, cooldown: float, end: float
) -> optax.Schedule:
    """A momentum that rises along a line in the first steps and falls likewise in the last.

    `low + (high - low) * min(1, t / warmup, (end - t) / cooldown)`, `low` from step `end` on.

    Args:
      low: First and last value, in [0, 1).
      high: The value between, in [0, 1).
      warmup: Steps of the rise.
      cooldown: Steps of the fall.
      end: Step at which it ends.

    Returns:
      A schedule of the step, counted from 0, for `nesterov_average` or `inject_hyperparams`.

    Raises:
      ValueError: A value outside [0, 1), steps that are not positive.

    Source: modded-nanogpt track 3, result #44: 0.85, 0.95, 300 steps, 200 steps.

    Example:
      >>> b1 = rise_and_fall(0.5, 0.75, warmup=4, cooldown=2, end=10)
      >>> [float(b1(t)) for t in (0, 1, 4, 8, 9, 12)]
      [0.5, 0.5625, 0.75, 0.75, 0.625, 0.5]
    """
    check_range("low", low)
    check_range("high", high)
    for name, value in (("warmup", warmup), ("cooldown", cooldown), ("end", end)):
        POSITIVE.but("steps")(name, value)

    def schedule(count):
        count = _wide(count)
        share = jnp.minimum(count / warmup, (end - count) / cooldown)
        return low + (high - low) * jnp.clip(share, 0.0, 1.0)

    return schedule


def _wide(count):
    """A step in the default float dtype: float64 where that is enabled, whatever counts it."""
    return jnp.asarray(count, float)
