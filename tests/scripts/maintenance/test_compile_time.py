"""Seconds and memory of a compilation, on shapes alone."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

import shampoo_jax
from scripts.maintenance import compile_time


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def test_the_models_have_the_size_of_their_name():
    assert count(compile_time.resnet50()) == 25_557_032
    assert 6.4e9 < count(compile_time.llama7b()) < 6.6e9
    matrices = jax.tree.leaves(compile_time.ragged())
    assert len(matrices) == 112 and len({x.shape for x in matrices}) == 8
    assert all(d % 1024 for x in matrices for d in x.shape)


def test_a_program_is_measured(monkeypatch, capsys):
    shapes = lambda: {"w": jax.ShapeDtypeStruct((6, 4), jnp.float32)}  # noqa: E731
    tiny = {name: (shapes, shampoo_jax.scale_by_shampoo, name == "a") for name in ("a", "b")}
    monkeypatch.setattr(compile_time, "CASES", tiny)
    monkeypatch.setattr(sys, "argv", ["compile_time"])
    compile_time.main()
    compiled, lowered = map(json.loads, capsys.readouterr().out.splitlines())
    assert compiled["case"] == "a" and compiled["temporary_mb"] == 0
    assert lowered["compile_s"] is None is lowered["temporary_mb"]
    assert all(found[key] >= 0 for found in (compiled, lowered) for key in ("trace_s", "lower_s"))


def test_an_unknown_case_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compile_time", "ragged", "bert"])
    with pytest.raises(SystemExit):
        compile_time.main()
    assert "CASE=bert is unknown: choose from ragged" in capsys.readouterr().err
