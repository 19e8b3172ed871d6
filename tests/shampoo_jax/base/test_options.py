"""Options that are refused or let through whatever function they are given to."""

import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_jax import (
    CarriedBasis,
    CoupledNewton,
    EighBasis,
    HigherOrderNewton,
    QRBasis,
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_weight": -0.5}, "first_weight=-0.5 must not be negative"),
        ({"damping": -1}, "damping=-1 must not be negative"),
        ({"max_scale": 0.0}, "max_scale=0.0: use 'size', 'relative' or a number above 0"),
        ({"max_scale": "none"}, "max_scale='none': use 'size'"),
        ({"exponent": 0.0}, "exponent=0.0 must be positive"),
        ({"eps": np.float32(-1)}, "eps=-1.0 must not be negative"),
        ({"eps": float("nan")}, "eps=nan must not be negative"),
        ({"every": np.int64(3), "solver": TruncatedEigh(0.0)}, "rtol=0.0.* with every=3"),
        ({"every": 2.0}, "every=2.0 must be a whole number"),
        ({"every": True}, "every=True must be a whole number"),
        ({"chunk": 1.5}, "chunk=1.5 must be a whole number"),
        ({"chunk": -1}, "chunk=-1 must be at least 1"),
        ({"b1": 0, "mu_dtype": jnp.bfloat16}, "mu_dtype=.* with b1=0: .*drop mu_dtype"),
        ({"every": 2, "solver": CarriedBasis(atol=0.1)}, "atol=0.1 with every=2: .*positive rtol"),
        ({"every": 2, "solver": TruncatedEigh(0.0)}, "rtol=0.0.* with every=2: .*positive rtol"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_options(options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TruncatedEigh(-1.0), r"rtol=-1.0 must lie in \[0, 1\)"),
        (lambda: ShiftedEigh(-1.0), "damping=-1.0 must not be negative"),
        (lambda: CoupledNewton(max_iterations=0), "max_iterations=0 must be at least 1"),
        (lambda: CoupledNewton(max_residual=-1.0), "max_residual=-1.0 must not be negative"),
        (lambda: HigherOrderNewton(-1e-6), "relative_damping=-1e-06 must not be negative"),
        (lambda: HigherOrderNewton(order=1), "order=1 must be at least 2"),
        (lambda: EighBasis(-1.0), "tolerance=-1.0 must not be negative"),
        (lambda: QRBasis(0), "iterations=0 must be at least 1"),
        (lambda: QRBasis(sort="up"), "sort='up': use one of 'before', 'after', None"),  # type: ignore
        (lambda: CarriedBasis(damping=0.1, rtol=1e-3), "rtol=0.001.* with damping=0.1: .*drop"),
        (lambda: CarriedBasis(damping=0.1, atol=1e-3), "atol=0.001 with damping=0.1: .*drop"),
    ],
)
def test_impossible_solvers_and_bases_are_refused_where_they_are_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_a_closed_range_holds_one():
    check_range("b2", 1.0, closed=True)
    with pytest.raises(ValueError, match=r"b2=1.0 must lie in \[0, 1\)"):
        check_range("b2", 1.0)
    with pytest.raises(ValueError, match=r"b2=1.5 must lie in \[0, 1\]"):
        check_range("b2", np.float32(1.5), closed=True)
