"""Matrix functions against 99 recorded cases of Meta's package, see `scripts.golden_matrix`."""

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.maintenance import golden_matrix, replay_golden

PATH = Path(__file__).parents[2] / "golden" / "meta" / "70_matrix_functions.npz"
CASES, DATA = golden_matrix.load(PATH)


def name(index):
    case = CASES[index]
    return "-".join(
        [str(index), case["fn"], case.get("solver", {}).get("kind", ""), case["matrix"]]
    )


@pytest.mark.parametrize("index", range(len(CASES)), ids=name)
def test_case(index):
    assert golden_matrix.error(CASES[index], DATA, index) <= 1


def test_every_kind_of_case_is_there():
    assert len(CASES) == 99
    assert sum("raises" in case for case in CASES) == 7


def first(kind):
    """Index of the first case with this outcome."""
    return next(i for i, case in enumerate(CASES) if ("raises" in case) == (kind == "raises"))


def test_a_status_that_should_have_failed_or_not_is_a_miss():
    good, bad = first("succeeds"), first("raises")
    assert golden_matrix.error({**CASES[good], "raises": "Error"}, DATA, good) == np.inf
    fine = {k: v for k, v in CASES[bad].items() if k != "raises"}
    assert golden_matrix.error(fine, DATA, bad) == np.inf


def test_the_script_replays_matrix_files_and_fails_on_a_miss(tmp_path, capsys):
    arrays = {k: v for k, v in DATA.items() if k.startswith("in__")}
    indices = [first("succeeds"), first("raises")]
    arrays["cases"] = np.array(json.dumps([CASES[i] for i in indices]))
    arrays["out__0_0"] = DATA[f"out__{indices[0]}_0"]
    np.savez(tmp_path / "same.npz", **arrays)
    assert replay_golden.main([str(tmp_path / "same.npz")]) == 0
    np.savez(tmp_path / "moved.npz", **arrays | {"out__0_0": arrays["out__0_0"] * (1 + 1e-11)})
    assert replay_golden.main([str(tmp_path / f"{n}.npz") for n in ("same", "moved")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert ["MISS" in line for line in lines] == [False, False, True]
