"""Compares matrix functions with recorded cases of Meta's package, all in float64.

A file holds `cases`, a list in JSON; matrices `in__NAME`; and `out__INDEX_K`, the reference's
outputs. A case agrees if every output is within 2e-12 of its largest entry. An exception recorded
there is matched by a failed status: `ok` False, or ValueError for options that contradict each
other.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scripts.maintenance.golden_format import (
    ANY,
    COUNT,
    FROM_0,
    ORTHOGONAL,
    POSITIVE,
    RANKS,
    ROOTS,
    UP_TO_1,
    Section,
    Values,
    check_kind,
    check_section,
    one_of,
)
from shampoo_jax import matrix as functions

Array = jax.Array
Case = dict[str, Any]
Data = Mapping[str, np.ndarray]

TOLERANCE = 2e-12

COMMON = {"fn": ANY, "matrix": ANY}
OUTCOME = {"outputs": COUNT, "raises": ANY, "message": ANY, "note": ANY, "rank": ANY}
BASIS = {"basis": ANY, "epsilon": FROM_0, "tolerance": UP_TO_1}
FUNCTIONS: dict[str, dict[str, Values]] = {
    "inverse_root": {"exponent": POSITIVE, "epsilon": FROM_0, "solver": ANY},
    "orthogonalize": {"solver": ANY},
    "qr_eigendecomposition": BASIS | {"max_iterations": COUNT},
    "eigh_adaptive": BASIS,
}

_coupled_newton = jax.jit(functions.coupled_newton, static_argnames=("root", "max_iterations"))
_coupled_higher_order = jax.jit(
    functions.coupled_higher_order, static_argnames=("exponent", "order", "max_iterations")
)


def holds_cases(path: Path) -> bool:
    """Whether a file has this layout."""
    with np.load(path) as z:
        return "cases" in z


def load(path: Path) -> tuple[list[Case], dict[str, np.ndarray]]:
    """The cases and arrays of a file."""
    with np.load(path) as z:
        return json.loads(str(z["cases"])), dict(z)


def worst_error(cases: list[Case], data: Data) -> float:
    """The largest error over tolerance of all cases; at most 1 is agreement."""
    if not cases:
        raise ValueError("cases=[] compares nothing.")
    for index, case in enumerate(cases):
        check(case, f"cases[{index}]")
    return max(error(case, data, index) for index, case in enumerate(cases))


def check(case: Case, path: str) -> None:
    """Raises ValueError naming key and value of what a case may not have."""
    check_section(path, case, Section({"fn": one_of(*FUNCTIONS)}, dict.fromkeys(case, ANY)))
    rules = COMMON | FUNCTIONS[case["fn"]]
    if (case.get("solver") or {}).get("kind") == "newton_high_order":
        del rules["epsilon"]  # this solver has its own
    check_section(path, case, Section(rules, OUTCOME))
    if case["fn"] == "orthogonalize":
        check_kind(f"{path}.solver", case["solver"], ORTHOGONAL)
    elif case["fn"] == "inverse_root":
        check_kind(f"{path}.solver", case["solver"], ROOTS)
        if case["solver"]["kind"] == "eigh":
            check_kind(f"{path}.rank", case["rank"], RANKS)


def error(case: Case, data: Data, index: int) -> float:
    """Error over tolerance of one case; infinite where one side failed and the other did not."""
    with jax.enable_x64(True):
        outputs, ok = _run(case, data)
    if bool(ok) != ("raises" not in case):
        return math.inf
    if not ok:
        return 0.0
    expected = [data[f"out__{index}_{i}"] for i in range(case["outputs"])]
    ours = [np.asarray(output) for output in outputs]
    if len(ours) != len(expected):
        return math.inf
    if len(expected) == 2:  # columns of an eigenbasis have arbitrary signs
        ours[1] = ours[1] * np.sign(np.sum(ours[1] * expected[1], axis=0))
    return max(_miss(a, b) for a, b in zip(ours, expected, strict=True))


def _miss(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Error over tolerance of one output; infinite where ours is no number or not float64."""
    if ours.dtype != np.float64 or ours.shape != theirs.shape:
        return math.inf
    difference, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
    if difference == 0:
        return 0.0
    return float(np.nan_to_num(difference / (TOLERANCE * largest), nan=np.inf, posinf=np.inf))


def _run(case: Case, data: Data) -> tuple[list[Array], Any]:
    """Outputs of a case and whether its status is good."""
    matrix = jnp.asarray(data[f"in__{case['matrix']}"])
    match case["fn"]:
        case "orthogonalize":
            return _orthogonalized(matrix, case), True
        case "qr_eigendecomposition" | "eigh_adaptive":
            return _eigenbasis(matrix, case, jnp.asarray(data[f"in__{case['basis']}"])), True
    try:
        return _inverse_root(matrix, case)
    except ValueError:
        return [], False


def _inverse_root(matrix: Array, case: Case) -> tuple[list[Array], Array]:
    exponent, solver = case["exponent"], case["solver"]
    if solver["kind"] == "newton":
        result = _coupled_newton(
            matrix,
            functions.rational_root(exponent),
            case["epsilon"],
            max_residual=math.inf,  # Meta's package accepts a root after its last iteration
            **_given(solver, "max_iterations", "tolerance"),
        )
        return [result.root], result.ok
    if solver["kind"] == "newton_high_order":
        options = _given(solver, "order", "tolerance", "max_iterations")
        options["relative_damping"] = solver["rel_epsilon"]
        options["absolute_damping"] = solver["abs_epsilon"]
        result = _coupled_higher_order(matrix, exponent, **options)
        return [result.root], result.ok
    rank = case["rank"]
    if rank["kind"] == "shift":
        root, ok = functions.shifted_root(
            matrix, exponent, damping=case["epsilon"], before=rank["before"]
        )
    else:
        rtol, atol = rank["rtol"], rank["atol"]
        if case["epsilon"]:  # which the reference refuses beside a pseudo-inverse
            raise ValueError(f"epsilon={case['epsilon']} with a pseudo-inverse")
        root, ok = functions.truncated_root(matrix, exponent, rtol=rtol, atol=atol)
    return [root], ok


def _given(options: Case, *names: str) -> Case:
    """The options of these names that a case sets."""
    return {name: options[name] for name in names if name in options}


def _eigenbasis(matrix: Array, case: Case, basis: Array) -> list[Array]:
    matrix = matrix + case["epsilon"] * jnp.eye(matrix.shape[-1])
    if case["fn"] == "eigh_adaptive":
        return list(functions.adaptive_eigh(matrix, basis, case["tolerance"]))
    return list(
        functions.orthogonal_iteration(matrix, basis, case["max_iterations"], case["tolerance"])
    )


def _orthogonalized(matrix: Array, case: Case) -> list[Array]:
    solver = case["solver"]
    if solver["kind"] == "svd":
        return [functions.svd_orthogonalize(matrix)]
    return [functions.newton_schulz(matrix, solver["iterations"], solver["coefficients"])]
