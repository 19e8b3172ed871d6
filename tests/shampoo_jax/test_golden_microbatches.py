"""Recorded trajectories of optimizers whose statistics are of microbatches.

`make golden` replays their float32 recordings as well.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.maintenance import golden_microbatches, replay_golden

FILES = {p.stem[:2]: p for p in (Path(__file__).parents[1] / "golden" / "methods").glob("c*.npz")}


def loaded(number, names=None):
    with np.load(FILES[number]) as z:
        data = dict(z)
    config = json.loads(str(data["config"]))
    if names:
        data["names"] = np.asarray(json.dumps(names))
    return config, data


CASES = [
    *(("c1", ["tall", "emb"], mode) for mode in ("std", "cf", "inv", "full_clip")),
    *(
        ("c2", ["mat"], m)
        for m in "cf cf_adaptive inv full full_pre_ema loo_jensen twofold".split()
    ),
    *(("c3", ["vec"], mode) for mode in ("std", "cf", "inv", "full")),
]


@pytest.mark.parametrize(("number", "names", "mode"), CASES)
def test_mode(number, names, mode):
    config, data = loaded(number, None if mode == "full_clip" else names)  # of the global norm
    assert golden_microbatches.error(config, data, mode) <= 1


@pytest.mark.parametrize(
    ("number", "name", "mode", "other"),
    [
        ("c1", "tall", "cf", "full"),
        ("c2", "mat", "inv", "std"),
        ("c2", "mat", "loo", "loo_jensen"),
        ("c3", "vec", "full", "cf"),
    ],
)
def test_another_mode_is_a_miss(number, name, mode, other):
    config, data = loaded(number, [name])
    for key in ("param", "spread"):
        data[f"{mode}/{key}__{name}"] = data[f"{other}/{key}__{name}"]
    assert golden_microbatches.error(config, data, mode) > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modes": ["std", "half"]}, "modes='half'.*must be std"),
        ({"rho": 1.0}, "rho=1.0.*absent"),
        ({"root_freq": 0}, "root_freq=0.*>= 1"),
        ({"modes": []}, "nothing to compare"),
    ],
)
def test_what_is_not_in_the_format_is_refused(change, message):
    config, data = loaded("c1")
    with pytest.raises(ValueError, match=message):
        golden_microbatches.check(config | change, data)


def test_arrays_that_do_not_belong_together_are_refused():
    config, data = loaded("c2")
    with pytest.raises(ValueError, match=r"micro__mat has shape .* it must be"):
        golden_microbatches.check(config, data | {"micro__mat": data["micro__mat"][:, :3]})
    with pytest.raises(ValueError, match="not finite"):
        golden_microbatches.check(config, data | {"cf/spread__mat": np.full(12, np.nan)})


def test_the_command_prints_every_mode(monkeypatch, capsys):
    monkeypatch.setattr(
        golden_microbatches, "error", lambda config, data, mode: 2.0 * (mode == "cf")
    )
    assert replay_golden.main([str(FILES["c3"])]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[1].split() == ["c3_sophia_f64", "cf", "2.0000", "MISS"]
