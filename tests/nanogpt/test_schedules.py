"""Schedules against the benchmark script's table; A19 is a row of the list of parity traps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt.config import ScheduleConfig
from nanogpt.schedules import eta, learning_rate
from tests.oracles import speedrun

TABLE = json.loads((speedrun.GOLDEN / "schedule.json").read_text())
STEPS = sorted(TABLE["eta"], key=int)


def steps_and_values(table):
    return np.array([int(s) for s in table]), np.array(list(table.values()))


@pytest.mark.parametrize("steps", STEPS)
def test_a19_eta_equals_the_script(steps):
    """Counted from 0 at the first update, never 0 at the last; 0.3 K may be fractional."""
    index, expected = steps_and_values(TABLE["eta"][steps])
    config = ScheduleConfig(int(steps), cooldown=TABLE["cooldown_frac"])
    np.testing.assert_allclose(eta(index, config), expected, rtol=1e-6)
    with jax.enable_x64(True):
        np.testing.assert_allclose(eta(index, config), expected, rtol=0, atol=1e-12)


def test_a19_warmup_of_tuned_adamw():
    """Pull request 353: every group rises from 1e-7 to its own rate."""
    table = TABLE["warmup_tuned_adamw"]
    config = ScheduleConfig(
        table["K"], warmup_steps=table["warmup_steps"], warmup_from=table["start_lr"]
    )
    for peak, rates in table["lr"].items():
        index, expected = steps_and_values(rates)
        np.testing.assert_allclose(learning_rate(float(peak), config)(index), expected, rtol=1e-6)


def test_a19_warmup_of_the_first_adamw():
    """Result #2: (s + 1) / 250 on every group."""
    table = TABLE["warmup_first_adamw"]
    index, expected = steps_and_values(table["eta"])
    config = ScheduleConfig(table["K"], warmup_steps=table["warmup_steps"])
    np.testing.assert_allclose(eta(index, config), expected, rtol=1e-6)


def test_schedule_is_traceable_and_without_cooldown_constant():
    config = ScheduleConfig(steps=10, cooldown=0.0)
    values = jax.jit(jax.vmap(learning_rate(0.5, config)))(jnp.arange(10))
    np.testing.assert_array_equal(values, np.full(10, 0.5, np.float32))
