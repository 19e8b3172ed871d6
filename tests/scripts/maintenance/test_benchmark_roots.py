"""Root benchmark: its ratios, its cosines, and failures that cost nothing else."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from scripts.maintenance import benchmark_roots
from scripts.maintenance.benchmarking.fidelity import synthetic_gradients, update_cosines
from scripts.maintenance.benchmarking.gradients import coloured_factors, coloured_gradients
from scripts.maintenance.benchmarking.timing import time_calls


def reference_root(factors, exponent):
    """Truncated roots in float64 of float32 factors."""
    values, vectors = np.linalg.eigh(factors.astype(np.float64))
    keep = values > factors.shape[-1] * np.finfo(np.float32).eps * values[:, -1:]
    powers = np.where(keep, np.abs(values) ** -exponent, 0)
    return (vectors * powers[:, None, :]) @ vectors.swapaxes(1, 2)


@pytest.mark.parametrize("sides", [1, 2])
def test_the_reference_has_cosine_one_and_identity_less(sides):
    gradients = synthetic_gradients(24)["i^-1"][:, :, :16]
    exact = update_cosines(gradients, reference_root, sides=sides)
    assert exact.shape == (6,)
    np.testing.assert_allclose(exact, 1, atol=1e-6)
    plain = update_cosines(gradients, lambda f, e: np.broadcast_to(np.eye(f.shape[1]), f.shape))
    assert np.all(plain < 0.97)


def test_an_eigenvalue_at_the_cutoff_may_be_kept_or_dropped():
    cut = 4 * np.finfo(np.float32).eps
    gradient = np.diag(np.sqrt([1.0, 0.1, 0.01, 1.02 * cut]))[None]
    for kept in (True, False):

        def root(factors, exponent, kept=kept):
            values = np.diagonal(factors, axis1=1, axis2=2) ** -exponent
            return np.eye(4) * np.where(np.arange(4) < 3 + kept, values, 0)[:, None]

        np.testing.assert_allclose(update_cosines(gradient, root, last=1), 1, atol=1e-6)


def test_benchmark_gradients_change_and_are_hard():
    struct = jnp.zeros((48, 32))
    make = coloured_gradients({"a": struct, "b": struct})
    first, second = make(0), make(1)
    for other in (second["a"], second["b"], first["b"]):
        assert jnp.linalg.norm(first["a"] - other) > jnp.linalg.norm(first["a"])
    values = np.linalg.eigvalsh(np.asarray(coloured_factors(1, 96)[0], np.float64))
    relative = values[::-1] / values[-1]
    assert relative[1] > 0.1 and 1e-7 < relative[-1] < 1e-3


def test_the_timing_rule_averages_whole_periods():
    spent, clock = iter([9, 1, 3, 1, 5]), [0.0]
    times = time_calls(
        lambda i: clock.__setitem__(0, clock[0] + next(spent)),
        lambda i: clock.__setitem__(0, clock[0] + 100),  # off the clock
        rounds=2,
        calls=2,
        wall=lambda: clock[0],
        cpu=lambda: 2 * clock[0],
    )
    assert times.wall == (2, 3) and times.slowest == (3, 5) and times.cpu == (4, 6)
    assert times.summary()["step_s"] == 2.5 and times.summary()["least_s"] == 2


def test_rehearsal(tmp_path, capsys):
    arguments = ["--stacks", "2x8", "--exponents", "0.25", "0.4", "--repeats", "1"]
    arguments += ["--synthetic-size", "0", "--solvers", "eigh", "coupled_newton"]
    benchmark_roots.main([*arguments, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())["times"]
    assert [(r["solver"], r["exponent"]) for r in found] == [
        ("eigh", 0.25),
        ("coupled_newton", 0.25),
        ("eigh", 0.4),
        ("coupled_newton", 0.4),
    ]
    assert "0.4 is not 1/p" in found[3]["error"]
    good = found[:3]
    assert all(r["ok"] == 2 and r["wall_s"] > 0 and r["flops"] > 0 for r in good)
    # One baseline for all solvers of a stack and exponent.
    bases = [r["wall_s"] / r["wall_to_eigh"] for r in found[:2]]
    np.testing.assert_allclose(bases[0], bases[1])
    table = (tmp_path / "table.md").read_text()
    assert "| 2x8, 0.4 |" in table and table.endswith("nan |\n")
    assert table in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stacks": ("12",)}, "stacks='12': write COUNTxSIZE"),
        ({"solvers": ("magic",)}, "solvers=.'magic'.: choose from .*eigh"),
        ({"repeats": 0}, "repeats=0: must be at least 1"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        benchmark_roots.Options(**options)


def test_a_missing_recording_is_named(tmp_path):
    with pytest.raises(SystemExit, match="error: .*none.npz"):
        benchmark_roots.main(["--gradients", str(tmp_path / "none.npz"), "--out", str(tmp_path)])
