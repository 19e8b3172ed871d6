"""Matrix functions against 99 recorded cases of Meta's package (float64).

An exception recorded there is matched by a failed status: `ok` False, or ValueError for options
that contradict each other.
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_jax.matrix import eigh, newton, orthogonalize, qr
from shampoo_jax.solvers import make_solver

PATH = Path(__file__).parents[2] / "golden" / "meta" / "70_matrix_functions.npz"
DATA = np.load(PATH)
CASES = json.loads(str(DATA["cases"]))

coupled_newton = jax.jit(newton.coupled_newton, static_argnames=("root", "max_iterations"))
coupled_higher_order = jax.jit(newton.coupled_higher_order, static_argnames=("exponent", "order"))


def inverse_root(matrix, case):
    exponent, solver = case["exponent"], case["solver"]
    if solver["kind"] == "newton":
        result = coupled_newton(
            matrix,
            newton.rational_root(exponent),
            case["epsilon"],
            max_iterations=solver["max_iterations"],
            tolerance=solver["tolerance"],
            max_residual=math.inf,  # Meta's package accepts a root after its last iteration
        )
        return [result.root], result.ok
    if solver["kind"] == "newton_high_order":
        options = {name: solver[name] for name in ("rel_epsilon", "abs_epsilon", "order")}
        result = coupled_higher_order(matrix, exponent, tolerance=solver["tolerance"], **options)
        return [result.root], result.ok
    rank = case["rank"]
    if rank["kind"] == "shift":
        root, ok = eigh.shifted_root(matrix, exponent, eps=case["epsilon"], before=rank["before"])
    else:
        rtol, atol = rank["rtol"], rank["atol"]
        make_solver("eigh", rtol=rtol, atol=atol, eps=case["epsilon"])  # refuses eps
        root, ok = eigh.truncated_root(matrix, exponent, rtol=rtol, atol=atol)
    return [root], ok


def eigenbasis(matrix, case):
    matrix = matrix + case["epsilon"] * jnp.eye(matrix.shape[-1])
    basis = jnp.asarray(DATA[f"in__{case['basis']}"])
    if case["fn"] == "eigh_adaptive":
        return qr.adaptive_eigh(matrix, basis, case["tolerance"])
    return qr.orthogonal_iteration(matrix, basis, case["max_iterations"], case["tolerance"])


def orthogonalized(matrix, case):
    solver = case["solver"]
    if solver["kind"] == "svd":
        return [orthogonalize.svd_orthogonalize(matrix)]
    return [orthogonalize.newton_schulz(matrix, solver["iterations"], solver["coefficients"])]


def run(case):
    """Returns the outputs and whether the status is good."""
    matrix = jnp.asarray(DATA[f"in__{case['matrix']}"])
    if case["fn"] == "orthogonalize":
        return orthogonalized(matrix, case), True
    if case["fn"] in ("qr_eigendecomposition", "eigh_adaptive"):
        return eigenbasis(matrix, case), True
    try:
        return inverse_root(matrix, case)
    except ValueError:
        return [], False


def name(index):
    case = CASES[index]
    return "-".join(
        [str(index), case["fn"], case.get("solver", {}).get("kind", ""), case["matrix"]]
    )


@pytest.mark.parametrize("index", range(len(CASES)), ids=name)
def test_case(index):
    with jax.enable_x64(True):
        outputs, ok = run(CASES[index])
    assert bool(ok) == ("raises" not in CASES[index])
    if not ok:
        return
    expected = [DATA[f"out__{index}_{i}"] for i in range(CASES[index]["outputs"])]
    outputs = [np.asarray(output) for output in outputs]
    if len(expected) == 2:  # columns of an eigenbasis have arbitrary signs
        outputs[1] = outputs[1] * np.sign(np.sum(outputs[1] * expected[1], axis=0))
    assert len(outputs) == len(expected)
    for output, target in zip(outputs, expected, strict=True):
        assert output.dtype == np.float64
        np.testing.assert_allclose(output, target, rtol=0, atol=2e-12 * np.abs(target).max())


def test_every_kind_of_case_is_there():
    assert len(CASES) == 99
    assert sum("raises" in case for case in CASES) == 7
