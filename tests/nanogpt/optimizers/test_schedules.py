"""Schedules against the benchmark script's tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt.config.run import ScheduleConfig
from nanogpt.optimizers.schedules import common_steps, eta, learning_rate
from scripts.maintenance.parity import inputs
from scripts.maintenance.parity.measurement import misses


@pytest.mark.trap("A19")
def test_a19_eta_equals_the_script():
    """Counted from 0 at the first update, never 0 at the last; 0.3 K may be fractional."""
    assert not misses(inputs.schedule())


@pytest.mark.trap("A19")
def test_a19_warmups_equal_the_scripts():
    assert not misses(inputs.warmups())


@pytest.mark.trap("A17")
def test_validation_steps_equal_the_script():
    assert not misses(inputs.validation_steps())


def test_schedule_is_traceable_and_without_cooldown_constant():
    config = ScheduleConfig(steps=10, cooldown=0.0)
    values = jax.jit(jax.vmap(learning_rate(0.5, config)))(jnp.arange(10))
    np.testing.assert_array_equal(values, np.full(10, 0.5, np.float32))


def test_cooldowns_of_records_27_and_33():
    """#27: (1 - s/3200)^1.25 in 3125 steps; #33: flat for half, then a line to 0.1."""
    s = np.arange(3125)
    config = ScheduleConfig(3125, cooldown=1.0, power=1.25, horizon=1.024)
    np.testing.assert_allclose(eta(s, config), (1 - s / 3200) ** 1.25, rtol=1e-5)
    s = np.arange(3400)
    config = ScheduleConfig(3400, cooldown=0.5, final=0.1)
    expected = 1 - 0.9 * np.maximum(0, s - 1700) / 1700
    np.testing.assert_allclose(eta(s, config), expected, rtol=1e-5)


def test_a_cosine_falls_from_the_warmup_to_its_floor():
    """As nanoGPT's: (1 + cos(pi (s - W) / (K - W))) / 2 between 1 and the floor."""
    config = ScheduleConfig(1000, cooldown=1.0, warmup_steps=100, final=0.1, shape="cosine")
    s = np.arange(1000)
    falling = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (s - 100) / 900))
    expected = np.where(s < 100, (s + 1) / 100, falling)
    np.testing.assert_allclose(eta(s, config), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "own", "common"),
    [
        ({"steps": 300}, None, 31),  # the shorter one falls at update 31
        ({"steps": 300, "warmup_steps": 5}, None, 0),
        ({"final": 0.5}, None, 31),
        ({}, {"cooldown": 0.9}, 11),
        ({"steps": 50, "cooldown": 0.0}, None, 31),
    ],
)
def test_updates_that_two_schedules_have_in_common(changed, own, common):
    one = {"schedule": dataclasses.asdict(ScheduleConfig(100)), "matrices_cooldown": None}
    other = {"schedule": one["schedule"] | changed, "matrices_cooldown": own}
    assert common_steps(one, other) == common_steps(other, one) == common
    assert common_steps(one, one) == 100
