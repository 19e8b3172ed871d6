"""Compiling many programs, of which some fail, and the rule by which calls are timed."""

import threading

import jax
import jax.numpy as jnp
import pytest

from scripts.maintenance.device.measure import (
    SLOW_S,
    Program,
    compile_all,
    ready,
    seconds_per_call,
)

STRUCT = jax.ShapeDtypeStruct((4,), jnp.float32)


def test_a_program_that_does_not_compile_leaves_the_others_alone():
    def bad(x):
        raise ValueError("x is wrong")

    compiled = compile_all(
        {"bad": Program(bad, (STRUCT,)), "good": Program(jnp.sin, (STRUCT,))}, 500
    )
    assert ready(compiled["good"])(jnp.zeros(4)).tolist() == [0.0] * 4
    assert compiled["good"].costs["compile_s"] > 0
    with pytest.raises(ValueError, match="x is wrong"):
        ready(compiled["bad"])


def test_a_program_that_does_not_end_is_left_behind():
    leave, begun = threading.Event(), threading.Event()

    def hanging(x):
        begun.set()
        leave.wait(60)
        return x

    try:
        compiled = compile_all({"hanging": Program(hanging, (STRUCT,))}, 0.0)
        with pytest.raises(TimeoutError, match="not compiled in 0 s"):
            ready(compiled["hanging"])
    finally:
        leave.set()


def timing(durations, **options):
    """Runs the rule on calls that take these seconds; returns its figure and the calls' count."""
    now, calls = [0.0], []

    def call(i):
        calls.append(i)
        now[0] += durations(i)
        return jnp.zeros(())

    return seconds_per_call(call, clock=lambda: now[0], **options), len(calls)


def test_the_median_of_rounds_counts_and_the_first_calls_do_not():
    def durations(i):
        return {0: 50.0, 1: 0.01}.get(i, 0.1 if i < 6 else 0.02)

    seconds, calls = timing(durations, rounds=3, calls=4)
    assert seconds == pytest.approx(0.02) and calls == 2 + 12


def test_slow_calls_are_timed_over_one_period():
    seconds, calls = timing(lambda i: 2 * SLOW_S, rounds=3, calls=10, period=5)
    assert seconds == pytest.approx(2 * SLOW_S) and calls == 2 + 5
