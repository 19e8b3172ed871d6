"""Schedules against the benchmark script's tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt.config.run import ScheduleConfig
from nanogpt.optimizers.schedules import eta, learning_rate
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
