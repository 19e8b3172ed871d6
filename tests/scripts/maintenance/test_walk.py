"""One way through: how much code a gradient passes is held down."""

import jax
import pytest

from scripts.maintenance.walk import count, walk

# files, functions, calls, depth; on Python 3.11, where comprehensions are functions.
LIMITS = {1: (22, 134, 286, 22), 8: (23, 155, 460, 22)}


@pytest.mark.parametrize("devices", LIMITS)
def test_the_walk_is_short(devices):
    calls, depth = walk(devices)
    found = (len({path for path, _ in calls}), len(calls), calls.total(), depth)
    assert all(a <= b for a, b in zip(found, LIMITS[devices], strict=True)), found
    assert ("parts/roots.py", "_refresh") in calls


def test_calls_and_depth_are_counted():
    from shampoo_jax.blocks.plan import block_key, merge_dimensions

    def two():
        block_key((3, 2))
        merge_dimensions((2, 2), 1, 8)

    calls, depth = count(two)
    # On Python 3.11 the list comprehension of the second one is a call of its own.
    assert calls["blocks/plan.py", "block_key"] == calls["blocks/plan.py", "merge_dimensions"] == 1
    assert 1 <= depth <= 2
    assert count(jax.numpy.ones, 3)[0].total() == 0
