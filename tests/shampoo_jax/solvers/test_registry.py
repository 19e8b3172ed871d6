"""Solvers by name: defaults, zeros, and names of one's own."""

import pytest

import shampoo_jax as sj
from shampoo_jax.solvers.registry import SOLVERS, make_solver


@pytest.mark.parametrize(
    ("name", "default", "undamped"),
    [
        ("shifted_eigh", sj.ShiftedEigh(), sj.ShiftedEigh(0.0)),
        ("coupled_newton", sj.CoupledNewton(), sj.CoupledNewton(0.0)),
        ("higher_order_newton", sj.HigherOrderNewton(), sj.HigherOrderNewton(0.0, 0.0)),
        ("eigh", sj.TruncatedEigh(), sj.TruncatedEigh()),
    ],
)
def test_eps_of_none_is_the_solvers_own_and_zero_is_no_damping(name, default, undamped):
    assert make_solver(name) == default
    assert make_solver(name, eps=0.0) == undamped
    assert make_solver(name, rtol=None, atol=0.0) == default


def test_positive_cutoff_keeps_every_positive_eigenvalue():
    assert make_solver("eigh", cutoff="positive") == sj.TruncatedEigh(0.0, 0.0)
    assert make_solver("eigh", rtol=1e-3, atol=1.0) == sj.TruncatedEigh(1e-3, 1.0)


def test_own_solver_gets_the_options_it_names(monkeypatch):
    monkeypatch.setitem(SOLVERS, "mine", lambda rtol=0.5: sj.TruncatedEigh(rtol))
    assert make_solver("mine") == sj.TruncatedEigh(0.5)
    assert make_solver("mine", rtol=0.1, eps=0.0) == sj.TruncatedEigh(0.1)
    with pytest.raises(ValueError, match="eps=0.1 has .*solver='mine'.*'shifted_eigh'"):
        make_solver("mine", eps=0.1)


def test_a_name_is_taken_once(monkeypatch):
    monkeypatch.setitem(SOLVERS, "mine", sj.ShiftedEigh)
    sj.register_solver("mine", sj.ShiftedEigh)
    with pytest.raises(ValueError, match="solver name 'mine' is taken by .*ShiftedEigh.*another"):
        sj.register_solver("mine", sj.CoupledNewton)
    assert SOLVERS["mine"] is sj.ShiftedEigh
