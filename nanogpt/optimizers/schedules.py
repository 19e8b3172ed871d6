"""Learning-rate schedules of the benchmark."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanogpt.config.run import Config, ScheduleConfig
from shampoo_jax import power_cool


def eta(step: jax.typing.ArrayLike, config: ScheduleConfig, peak: float = 1.0) -> jax.Array:
    """Multiplier of the learning rate at update `step`: min(warmup, cooldown).

    With K = `steps` and c = `cooldown`, the cooldown is min(1, (K - s) / (c K)): flat, then linear,
    and 1 / (c K) rather than 0 at the last update. In general K is `horizon` times `steps`, the
    line is raised to `power`, and it goes from 1 to `final` instead of 0. A cosine has the value
    (1 - cos(pi x)) / 2 where the line has x, and falls after the warmup only. The warmup over
    W = `warmup_steps` is (s + 1) / W, or, if `warmup_from` = f is set, the straight line from f at
    s = 0 to `peak` at s = W, as a fraction of `peak`.

    Args:
        step: Index s of the update, 0 .. K-1; int scalar or array.
        config: The schedule.
        peak: Learning rate at eta = 1; read only with `warmup_from`.

    Returns:
        float array of the shape of `step`.

    Source: modded-nanogpt track 3, results #36 (no warmup), #2 ((s + 1) / W), pull request 353
    (from 1e-7), #27 (power 1.25, horizon 1.024) and #33 (final 0.1).

    Example:
        >>> [round(float(eta(s, ScheduleConfig(steps=10))), 4) for s in (0, 3, 4, 9)]
        [1.0, 1.0, 0.8571, 0.1429]
    """
    step = jnp.asarray(step)
    end = config.steps if config.horizon == 1 else config.horizon * config.steps
    fraction = config.cooldown
    if config.shape == "cosine":
        fraction = max(min(fraction, 1 - config.warmup_steps / end), 1 / end)
    # A cosine has its own line; everything else is what the library has.
    if config.shape == "cosine":
        line = (1 - jnp.cos(jnp.pi * power_cool(1.0, end, fraction * end)(step))) / 2
        line = line if config.power == 1 else line**config.power
        multiplier = line if config.final == 0 else config.final + (1 - config.final) * line
    else:
        rest = {"power": config.power, "final": config.final}
        multiplier = power_cool(1.0, end, fraction * end, **rest)(step)
    if config.warmup_steps:
        if config.warmup_from is None:
            warmup = (step + 1) / config.warmup_steps
        else:
            start = config.warmup_from / peak
            warmup = start + step / config.warmup_steps * (1 - start)
        multiplier = jnp.minimum(multiplier, warmup)
    return multiplier


def learning_rate(peak: float, config: ScheduleConfig) -> optax.Schedule:
    """Builds the Optax schedule peak * eta(step).

    Args:
        peak: Learning rate at eta = 1.
        config: The schedule.

    Returns:
        Function from the update's index (0 at the first update) to its learning rate.

    Example:
        >>> float(learning_rate(0.5, ScheduleConfig(steps=10))(0))
        0.5
    """
    return lambda step: peak * eta(step, config, peak)


def lookahead_schedule(config: Config) -> optax.Schedule:
    """Builds the schedule of how far ahead step s takes its gradient: 0, or size * eta(s - 1).

    Args:
        config: The run, with `lookahead`.

    Source: modded-nanogpt track 3, result #44.
    """
    ahead = config.lookahead
    assert ahead is not None

    def schedule(step):
        inside = (step >= ahead.start) & (step < ahead.end)
        return jnp.where(inside, ahead.size * eta(step - 1, config.schedule), 0.0)

    return schedule


def window_schedule(config: Config) -> optax.Schedule:
    """Builds the schedule of attention's window in blocks, of the model of kind medium.

    At x = s / K of the run the window has (4 x^3 - 6 x^2 + 3 x) times `model.window` tokens,
    rounded up to whole blocks, at least one. Steps at which it grows are found in float64.

    Args:
        config: The run; K is `schedule.steps`.

    Source: modded-nanogpt, records/track_2_medium, 2025-04-22_Record8.

    Example:
        >>> from nanogpt.config.presets import preset
        >>> [int(window_schedule(preset("medium", "muon_mlp_decay"))(s)) for s in (0, 2000, 5960)]
        [1, 14, 27]
    """
    block, x = config.model.mask_block, np.arange(config.schedule.steps + 1) / config.schedule.steps
    tokens = config.model.window * (4 * x**3 - 6 * x**2 + 3 * x)
    blocks = np.maximum(np.ceil(tokens / block), 1).astype(np.int32)
    grows = np.flatnonzero(np.diff(blocks)) + 1
    sizes = jnp.asarray(blocks[[0, *grows]])
    return lambda step: sizes[jnp.searchsorted(grows, step, side="right")]


def matrices_schedule(config: Config) -> ScheduleConfig:
    """Returns the schedule of a run's block matrices, which may be one of their own."""
    own = config.matrices_cooldown
    return config.schedule if own is None else replace(config.schedule, **_set(asdict(own)))


def _set(own: Mapping[str, Any]) -> dict[str, Any]:
    """What the matrices' own schedule says; the rest is the run's."""
    return {name: value for name, value in own.items() if value is not None}


def common_steps(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """Returns how many updates two runs have in common, if they differ in their schedules alone.

    Args:
        one: a run's settings as JSON gives them back, with "schedule" and "matrices_cooldown".
        other: the same of another run.
    """
    steps = np.arange(min(run["schedule"]["steps"] for run in (one, other)))

    def multipliers(run: Mapping[str, Any]) -> np.ndarray:
        schedule = run["schedule"]
        own = schedule | _set(run["matrices_cooldown"] or {})
        return np.stack([eta(steps, ScheduleConfig(**group)) for group in (schedule, own)])

    differ = (multipliers(one) != multipliers(other)).any(axis=0)
    return int(differ.argmax()) if differ.any() else len(steps)
