"""Temporary memory of a step, beside another package's."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from scripts.maintenance import memory


def test_rows_of_this_package_and_of_another(monkeypatch, capsys, tmp_path):
    (tmp_path / "soap_jax.py").write_text("from optax import adam as soap\n")
    shapes = lambda: {"w": jax.ShapeDtypeStruct((6, 4), jnp.float32)}  # noqa: E731
    monkeypatch.setattr(memory, "CASES", {"tiny": shapes})
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["memory", "one_sided_shampoo", "--against", str(tmp_path)])
    memory.main()
    ours, theirs = map(json.loads, capsys.readouterr().out.splitlines())
    assert (ours["case"], ours["optimizer"]) == ("tiny", "one_sided_shampoo")
    assert ours["of_parameters"] > 1 and 0 < ours["explain"]
    assert theirs["optimizer"] == "SOAP_JAX" and "explain" not in theirs


def test_an_unknown_optimizer_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory", "muon"])
    with pytest.raises(SystemExit):
        memory.main()
    assert "NAME=muon is unknown: choose from soap" in capsys.readouterr().err
