"""What the picture shows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.report.curves import Curve
from nanogpt.report.plotting import draw, limits, spread

FAST = Curve("fast", range(0, 101, 10), np.linspace(7.0, 3.0, 11), range(11))
SLOW = Curve("slow", range(0, 101, 10), np.linspace(7.0, 4.0, 11), range(11))


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.floats(0.01, 3))
def test_spread_labels_neither_overlap_nor_change_order(positions, gap):
    moved = spread(positions, gap)
    order = np.argsort(positions, kind="stable")
    assert np.all(np.diff(np.array(moved)[order]) >= gap * (1 - 1e-6))
    assert np.mean(moved) == pytest.approx(np.mean(positions), abs=1e-6)


def test_labels_that_have_room_stay():
    assert spread([5.0, 1.0, 3.0], gap=1.0) == [5.0, 1.0, 3.0]


def test_limits_leave_out_the_first_fall_and_show_every_end():
    low, high = limits([FAST, SLOW])
    assert 2.7 < low < 3.0
    assert 6.7 <= high < 7.0  # the slow run after a tenth of its steps is at 6.7


def test_limits_show_every_baseline():
    low, high = limits([FAST, SLOW], [8.0, 2.5])
    assert 2.0 < low < 2.5
    assert 8.0 < high < 8.5


def test_limits_show_runs_that_are_worse_than_every_baseline():
    low, high = limits([FAST, SLOW], [2.0])
    assert 6.7 <= high


def test_limits_of_a_constant_are_not_empty():
    low, high = limits([Curve("flat", [0, 1], [2.0, 2.0], [0, 1])])
    assert low < 2.0 < high


@pytest.mark.parametrize("baselines", [{}, {"bigram": 3.0}])
@pytest.mark.parametrize("first", [7.0, np.nan])
def test_diverged_runs_still_give_a_picture(tmp_path, first, baselines):
    runs = [Curve(name, [0, 10, 20], [first, np.nan, np.nan], [0, 1, 2]) for name in ("a", "b")]
    low, high = limits(runs, baselines.values())
    assert np.isfinite([low, high]).all() and low < high
    draw(tmp_path / "picture.png", runs, baselines=baselines)
    assert (tmp_path / "picture.png").stat().st_size > 1000
