"""Solvers by name: defaults, objects, and names of one's own."""

import pytest

import shampoo_jax as sj
from shampoo_jax.solvers.registry import SOLVERS, make_solver

NAMED = {
    "auto": sj.Auto(),
    "eigh": sj.TruncatedEigh(),
    "shifted_eigh": sj.ShiftedEigh(),
    "coupled_newton": sj.CoupledNewton(),
    "higher_order_newton": sj.HigherOrderNewton(),
    "polynomial": sj.Polynomial(),
    "polynomial_clip": sj.Polynomial(semantics="clip"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_name_is_the_solver_with_its_defaults(name):
    assert make_solver(name) == NAMED[name]


def test_every_name_is_listed():
    assert set(sj.solver_names()) >= set(NAMED)


def test_an_object_is_itself():
    solver = sj.TruncatedEigh(rtol=1e-3, atol=1.0)
    assert make_solver(solver) is solver


def test_an_unknown_name_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"solver='cholesky' is unknown: .*'eigh'.*Solver such as"):
        make_solver("cholesky")


def test_own_solver_by_name(monkeypatch):
    monkeypatch.setitem(SOLVERS, "other", SOLVERS["eigh"])  # so that the names added go again
    monkeypatch.delitem(SOLVERS, "other")
    sj.register_solver("other", lambda rtol=0.5: sj.TruncatedEigh(rtol))
    assert make_solver("other") == sj.TruncatedEigh(0.5)
    assert "other" in sj.solver_names()


def test_a_name_is_taken_once(monkeypatch):
    monkeypatch.setitem(SOLVERS, "mine", sj.ShiftedEigh)
    sj.register_solver("mine", sj.ShiftedEigh)
    with pytest.raises(ValueError, match="solver name 'mine' is taken by .*ShiftedEigh.*another"):
        sj.register_solver("mine", sj.CoupledNewton)
    assert SOLVERS["mine"] is sj.ShiftedEigh
