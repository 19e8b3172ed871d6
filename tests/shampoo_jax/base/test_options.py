"""Options that are refused or let through whatever function they are given to."""

import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_jax import (
    CarriedBasis,
    ShiftedEigh,
    TruncatedEigh,
)
from shampoo_jax.base.options import check_options, check_range


@pytest.mark.parametrize(
    "options",
    [
        {"b1": 0.0, "b3": 0.0},
        {"b1": 0.0, "b3": None},
        {"b1": 0.9, "b3": 0.5},
        {"graft": "rmsprop", "b2": 1.0},
        {"damping": 0.0, "rtol": None},
        {"damping": 1e-6, "rtol": 0.0},
        {"every": 5, "atol": 0.0},
        {"every": 1, "solver": TruncatedEigh(0.0)},
        {"every": jnp.asarray(3), "eps": jnp.asarray(1.0), "merge": None},
        {"every": np.int64(3), "max_scale": 5.0},
        {"max_scale": "size"},
        {"every": 5, "solver": TruncatedEigh(1e-3)},
        {"every": 5, "solver": CarriedBasis(damping=1e-3)},
        {"every": 5, "solver": ShiftedEigh()},
        {"every": 1, "solver": TruncatedEigh(0.0, 0.1), "chunk": 1},
    ],
)
def test_sensible_options_pass(options):
    check_options(options)


def test_only_a_closed_range_holds_one():
    check_range("b2", 1.0, closed=True)
    with pytest.raises(ValueError, match=r"b2=1.0 must lie in \[0, 1\)"):
        check_range("b2", 1.0)
    with pytest.raises(ValueError, match=r"b2=1.5 must lie in \[0, 1\]"):
        check_range("b2", np.float32(1.5), closed=True)
