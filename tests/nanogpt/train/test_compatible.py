"""What may differ between a checkpoint and a run, and what is said where something else does."""

import copy
import re

import jax
import jax.numpy as jnp
import pytest

import shampoo_jax
from nanogpt.train.compatible import first_difference, layout_difference, layout_of

PARAMS = {
    "a": jnp.ones((4, 4)),
    "b": jnp.ones((4, 4)),
    "c": jnp.ones((4, 4)),
    "d": jnp.ones((2, 4)),
}


@pytest.fixture(scope="module")
def saved():
    return layout_of(jax.jit(shampoo_jax.scale_by_shampoo().init)(PARAMS))


def test_first_difference_looks_inside_and_in_order():
    before = {"a": 1, "b": {"c": [1, 2], "d": 0}, "output": {"x": 1}}
    assert first_difference(before, before) is None
    assert first_difference(before, before | {"output": 5}) is None
    now = {"a": 1, "b": {"c": [1, 3], "d": 1}, "output": {"x": 1}}
    assert first_difference(before, now) == ("b.c", [1, 2], [1, 3])
    assert first_difference(before, before | {"new": 7}) == ("new", None, 7)


def test_zero_blocks_at_the_end_are_no_difference(saved):
    """As for 2 owners: stacks of 3 and 1 are filled to 4 and 2."""
    padded = copy.deepcopy(saved)
    place = padded["stacks"][0]
    assert {key: len(blocks) for key, blocks in place.items()} == {"4x4": 3, "4x2": 1}
    for blocks in place.values():
        blocks.append(-1)
    for shape in padded["shapes"].values():
        if shape[:1] in ([3], [1]):
            shape[0] += 1
    assert layout_difference(saved, padded) == layout_difference(padded, saved) == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"blocking": shampoo_jax.Blocking(2)},
            "has .*: it was made .* with other options",
        ),
        ({"exponents": 0.5}, ""),  # what is done with the factors
        ({"graft": None}, "it has .*: it was made by another optimizer or with other options"),
        ({"mu_dtype": "bfloat16"}, ""),  # rounded as it is read
    ],
)
def test_other_options_that_the_state_depends_on_are_told(saved, options, reason):
    state = jax.jit(shampoo_jax.scale_by_shampoo(**options).init)(PARAMS)
    difference = layout_difference(saved, layout_of(state))
    assert re.search(reason, difference) and bool(reason) == bool(difference)


def test_another_format_and_other_shapes_are_told(saved):
    older = saved | {"format": 1}
    assert "format number 1" in layout_difference(older, saved)
    cut = [[[0] * 4] * 4]
    assert "cut or read otherwise (block_size" in layout_difference(saved | {"cut": cut}, saved)
    path = next(path for path, shape in saved["shapes"].items() if len(shape) == 3)
    for shape in ([9, 4, 4], [3, 4, 5]):
        changed = saved | {"shapes": saved["shapes"] | {path: shape}}
        assert f"has shape {tuple(shape)}" in layout_difference(changed, saved)
