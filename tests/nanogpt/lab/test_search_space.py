"""Points of a search: combinations, draws, and that a wider search contains the narrower one."""

import math

import numpy as np
import pytest

from nanogpt.lab.search_space import parse_range, points

LISTS = {"a": ("1", "2", "3"), "b": ("x", "y")}


def test_all_combinations():
    found = points(LISTS)
    assert len(found) == 6 == len({tuple(point.items()) for point in found})


def test_a_budget_below_the_grid_takes_some_and_widens():
    small, large = points(LISTS, runs=2, seed=1), points(LISTS, runs=5, seed=1)
    assert len(small) == 2 and len(large) == 5
    assert all(point in large for point in small)
    assert points(LISTS, runs=9) == points(LISTS)
    assert points(LISTS, runs=2, seed=2) != small


def test_draws_take_turns_and_widen():
    ranges = dict(map(parse_range, ["c=log:1e-3:1e-1", "d=lin:-1:1"]))
    found = points(LISTS, ranges, runs=600)
    assert found[:60] == points(LISTS, ranges, runs=60)
    assert sum(point["a"] == "1" for point in found) == 200
    logs = np.log10([float(point["c"]) for point in found])
    assert (np.histogram(logs, bins=4, range=(-3, -1))[0] > 100).all()  # 150 each, if uniform
    assert abs(np.mean([float(point["d"]) for point in found])) < 4 / math.sqrt(3 * 600)


def test_draws_need_a_budget():
    with pytest.raises(ValueError, match="say by --runs how many"):
        points({}, dict([parse_range("c=lin:0:1")]))
