"""Options that are refused or let through whatever function they are given to."""

import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_jax.options import check_options, check_range


@pytest.mark.parametrize(
    "options",
    [
        {"b1": 0.0, "b3": 0.0},
        {"b1": 0.0, "b3": None},
        {"b1": 0.9, "b3": 0.5},
        {"graft": "rmsprop", "graft_b2": 0.9},
        {"factor_eps": 0.0, "rtol": None},
        {"factor_eps": 1e-6, "rtol": 0.0},
        {"factor_eps": 1e-6},
        {"every": 5, "cutoff": "relative", "atol": 0.0},
        {"every": 1, "cutoff": "positive"},
        {"every": jnp.asarray(3), "eps": jnp.asarray(1.0), "merge": None},
        {"every": np.int64(3), "cap": 5.0},
        {"cap": "size"},
    ],
)
def test_sensible_options_pass(options):
    check_options(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_weight": -0.5}, "first_weight=-0.5 must not be negative"),
        ({"adamw_eps": -1}, "adamw_eps=-1 must not be negative"),
        ({"eps": np.float32(-1)}, "eps=-1.0 must not be negative"),
        ({"eps": float("nan")}, "eps=nan must not be negative"),
        ({"every": np.int64(3), "cutoff": "positive"}, "cutoff='positive' with every=3"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_options(options)


def test_only_a_closed_range_holds_one():
    check_range("b2", 1.0, closed=True)
    with pytest.raises(ValueError, match=r"b2=1.0 must lie in \[0, 1\)"):
        check_range("b2", 1.0)
    with pytest.raises(ValueError, match=r"b2=1.5 must lie in \[0, 1\]"):
        check_range("b2", np.float32(1.5), closed=True)
