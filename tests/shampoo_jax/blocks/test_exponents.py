"""Exponents by block shape from every form of the option."""

import numpy as np
import pytest

from shampoo_jax.blocks.exponents import default_exponents, given_exponents, resolve_exponents


def test_exponents():
    assert default_exponents(()) == ()
    assert default_exponents((5,)) == (1 / 2,)
    assert default_exponents((5, 6)) == (1 / 4, 1 / 4)
    assert default_exponents((5, 6, 7)) == (1 / 6,) * 3
    assert resolve_exponents(None)((2, 3, 4, 5)) == (1 / 8,) * 4
    assert resolve_exponents(0.4)((2, 3)) == (0.4, 0.4)
    assert resolve_exponents(np.float32(0.5))((2,)) == (0.5,)
    mixed = resolve_exponents({2: {0: 0.5, 1: 0.0}, 3: {2: 1}, 1: 0})
    assert (mixed((5,)), mixed((5, 6))) == ((0.0,), (0.5, 0.0))
    assert mixed((5, 6, 7)) == (1 / 6, 1 / 6, 1.0)
    assert mixed((1, 2, 3, 4)) == (1 / 8,) * 4


def test_the_smaller_side_of_a_matrix_is_the_last_one_where_both_are_equal():
    smaller = resolve_exponents("smaller")
    assert given_exponents("smaller") == {0.5}
    assert (smaller((3, 2)), smaller((2, 3)), smaller((2, 2))) == ((0, 0.5), (0.5, 0), (0, 0.5))
    assert (smaller(()), smaller((4,)), smaller((4, 2, 2))) == ((), (0.5,), (0, 0, 0.5))
    left, right = resolve_exponents("left"), resolve_exponents("right")
    assert (left((2, 3, 4)), right((2, 3)), right(())) == ((0.5, 0, 0), (0, 0.5), ())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("larger", "exponents='larger': the only names are .*'smaller'.*'auto'"),
        (-0.5, "exponents: -0.5 must not be negative"),
        ({2: {0: -1}}, "exponents: -1 must not be negative"),
        (float("nan"), "exponents: nan must not be"),
        ({2: float("inf")}, "exponents: inf must not be"),
        (True, "exponents: True must not be"),
        ({1: "0.5"}, "exponents: '0.5' must not be"),
        ({"2": 0.5}, "exponents has the key '2': .*int"),
        ({2: {"0": 0.5}}, "exponents has the key '0': .*int"),
        ({2: {2: 0.5}}, r"exponents\[2\] names dimension 2: .* dimensions have 0 to 1"),
    ],
)
def test_bad_exponents_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        resolve_exponents(option)
