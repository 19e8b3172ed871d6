"""The package's optimizer is built from a recording's config; the package itself is not needed."""

import math
import sys
from pathlib import Path

import pytest

from scripts.maintenance import record_meta_states, replay_golden

META = Path(__file__).parents[3] / "tests" / "golden" / "meta"


class Called:
    """Stands for a module: each of its classes gives its name and what it was called with."""

    WeightDecayType = {"DECOUPLED": "decoupled"}

    def __getattr__(self, name):
        return lambda *positional, **options: (name, {**dict(enumerate(positional)), **options})


PACKAGE = record_meta_states.Package(None, Called(), Called())


def built(number, **changes):
    (path,) = META.glob(f"{number}_*.npz")
    config = replay_golden.load(path).config | changes
    return record_meta_states.make_optimizer(PACKAGE, ["w"], config, 0.01)[1]


def test_the_record_is_built_as_published():
    options = built("09")
    assert (options["lr"], options["betas"], options["epsilon"]) == (0.01, (0.9, 0.9), 0.0)
    assert (options["weight_decay"], options["weight_decay_type"]) == (0.1, "decoupled")
    assert options["grafting_config"][1] == {"beta2": 0.9, "epsilon": 1e-15}
    kind, settings = options["preconditioner_config"]
    assert kind == "RootInvShampooPreconditionerConfig"
    name, method = settings["amortized_computation_config"]
    rule = ("PseudoInverseConfig", {"rank_atol": 0.0, "rank_rtol": 0.0})
    assert (name, method) == ("EigenConfig", {"rank_deficient_stability_config": rule})
    distributed = options["distributed_config"][1]
    assert distributed["target_parameter_dimensionality"] == math.inf


@pytest.mark.parametrize(
    ("number", "kind", "method"),
    [
        ("32", "EigenvalueCorrectedShampoo", "QREigendecompositionConfig"),
        ("35", "EigendecomposedShampoo", "EighEigendecompositionConfig"),
        ("39", "RootInvKLShampoo", "EigenConfig"),
    ],
)
def test_every_kind_has_its_method(number, kind, method):
    name, settings = built(number)["preconditioner_config"]
    assert name == f"{kind}PreconditionerConfig"
    assert settings["amortized_computation_config"][0] == method


def test_momentum_and_averaging():
    name, options = built("27")["iterate_averaging_config"]
    assert (name, options["use_nesterov"]) == ("ClassicMomentumConfig", True)
    assert built("48")["iterate_averaging_config"][0] == "GeneralizedPrimalAveragingConfig"
    assert built("49", learning_rate=0.01)["iterate_averaging_config"][0] == "ScheduleFreeConfig"


def test_what_is_not_recorded_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="float32"):
        built("60")
    with pytest.raises(ValueError, match="not recorded"):
        built("41")
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "")
    with pytest.raises(ValueError, match="install torch, and name the folder"):
        record_meta_states.load_package(tmp_path)
