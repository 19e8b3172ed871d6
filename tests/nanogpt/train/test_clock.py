"""The training clock."""

import pytest

from nanogpt.train.clock import StepClock


def clock(*ticks: float, elapsed: float = 0.0) -> StepClock:
    return StepClock(elapsed, now=iter(ticks).__next__)


def test_pauses_do_not_count():
    timer = clock(0.0, 2.0, 100.0, 103.0)
    timer.start()
    timer.lap()
    timer.start()  # 98 seconds of validation
    timer.lap()
    assert timer.laps == [2.0, 3.0]
    assert timer.elapsed == 5.0


def test_earlier_processes_count_but_not_in_the_median():
    timer = clock(0.0, 2.0, 10.0, 13.0, elapsed=50.0)
    timer.start()
    assert [timer.lap() for _ in range(3)] == [2.0, 8.0, 3.0]
    assert timer.elapsed == 63.0
    assert timer.median() == 3.0
    assert timer.recent(2) == pytest.approx(5.5)
    assert timer.recent(99) == pytest.approx(13 / 3)


def test_no_median_without_a_lap():
    assert clock().median() is None
