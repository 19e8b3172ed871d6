"""Step benchmark: splits, ratios, XLA's accounts, failures, and Meta's package beside ours."""

import json
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scripts.maintenance import benchmark_step
from scripts.maintenance.benchmarking import report
from scripts.maintenance.benchmarking.candidates import PARTS, Candidate, Stage, candidates
from scripts.maintenance.benchmarking.costs import compile_function
from scripts.maintenance.benchmarking.reference import measure_reference

PARAMS = {"w": jax.ShapeDtypeStruct((8, 4), "float32")}


def test_flops_and_memory_of_a_known_product():
    a, b = jax.ShapeDtypeStruct((32, 16), "float32"), jax.ShapeDtypeStruct((16, 64), "float32")
    compiled, costs = compile_function(jnp.matmul, a, b)
    assert costs["flops"] == pytest.approx(2 * 32 * 16 * 64, rel=0.01)
    least = 4 * (32 * 16 + 16 * 64 + 32 * 64)
    assert least <= costs["peak_memory_bytes"] < 2 * least
    assert costs["bytes"] >= least and costs["compile_s"] > 0
    np.testing.assert_array_equal(compiled(jnp.ones(a.shape), jnp.ones(b.shape))[0, 0], 16)


def test_a_donated_argument_is_counted_once():
    x = jax.ShapeDtypeStruct((64, 64), "float32")
    kept = compile_function(lambda x: x + 1, x)[1]["peak_memory_bytes"]
    donated = compile_function(lambda x: x + 1, x, donate=(0,))[1]["peak_memory_bytes"]
    assert donated == kept - 4 * 64 * 64


@pytest.fixture(scope="module")
def measure():
    return benchmark_step.Measure(PARAMS, rounds=2)


def test_parts_add_up_and_shared_stages_are_timed_once(measure):
    built = []

    def stage(part, key, tx):
        return Stage(part, key, lambda: built.append(key) or tx)

    first = stage("rest", "trace", optax.trace(0.9))
    last = stage("roots", "adam", optax.scale_by_adam())
    records = [measure(Candidate(name, 3, (first, last))) for name in ("a", "b")]
    assert built == ["trace", "adam"]
    for record in records:
        assert record["rest"] + record["roots"] == pytest.approx(record["step_s"])
        assert record["step_s"] <= record["slowest_s"]
        # Adam's two moments and its count, the rate's and the decay's nothing.
        assert record["state_bytes"] == 2 * 4 * 8 * 4 + 4


def test_a_failure_is_recorded_with_its_remedy(measure, monkeypatch):
    monkeypatch.setitem(sys.modules, "psgdax", None)
    psgd = next(c for c in candidates([], [1], None) if c.name == "psgd_kron")
    assert measure(psgd)["error"].startswith("not installed: pip install psgdax")


def test_ratios():
    records = [
        {"name": "adamw", "step_s": 1.0},
        {"name": "muon_5", "step_s": 2.0},
        {"name": "broken", "error": "x"},
        {"name": "shampoo_eigh_1", "step_s": 6.0},
    ]
    adamw, muon, broken, ours = report.with_ratios(records, model_s=8.0)
    assert muon["to_muon"] == 1 and muon["train_to_muon"] == 1 and adamw["to_adamw"] == 1
    assert ours["to_muon"] == 3 and ours["to_adamw"] == 6
    assert ours["train_to_muon"] == pytest.approx(14 / 10) and ours["share"] == pytest.approx(
        6 / 14
    )
    assert broken == records[2]
    assert "share" not in report.with_ratios(records, None)[0]


def test_every_optimizer_and_solver_has_a_name_of_its_own():
    every = list(candidates(["eigh", "coupled_newton"], [1, 5], 4))
    names = [c.name for c in every]
    assert len(set(names)) == len(names)
    assert names[:5] == ["adamw", "muon_5", "muon_12", "muon_12_bfloat16", "psgd_kron"]
    assert {"shampoo_eigh_1", "shampoo_eigh_5_staggered", "soap_5", "kl_shampoo_1"} < set(names)
    assert "shampoo_eigh_1_staggered" not in names
    for candidate in every:
        parts = [stage.part for stage in candidate.stages]
        assert len(set(parts)) == len(parts) and set(parts) <= set(PARTS)


STAND_IN = {
    "torch.py": """
        import numpy
        class Tensor:
            def __init__(self, x): self.x, self.shape, self.grad = x, x.shape, None
            def to(self, device): assert device == "cpu"; return self
        from_numpy = Tensor
        class nn:
            Parameter = staticmethod(lambda tensor: tensor)
    """,
    "distributed_shampoo/__init__.py": """
        class Config:
            def __init__(self, **options): self.__dict__.update(options)
        AdamPreconditionerConfig = RootInvShampooPreconditionerConfig = EigenConfig = Config
        class DistributedShampoo:
            def __init__(self, params, **options):
                root = options["preconditioner_config"].amortized_computation_config
                assert root.rank_deficient_stability_config.rank_rtol is None
                assert options["epsilon"] == 0 and options["max_preconditioner_dim"] == 64
                assert options["precondition_frequency"] == 2
                assert sorted(p.shape for p in params)[-1] == (64, 16)
                self.params, self.last = params, None
            def step(self):
                norm = sum(float(abs(p.grad.x).sum()) for p in self.params)
                assert norm > 0 and norm != self.last
                self.last = norm
    """,
    "distributed_shampoo/shampoo_types.py": """
        from distributed_shampoo import Config as PseudoInverseConfig
    """,
}


@pytest.fixture
def package(tmp_path):
    """A folder with stand-ins for torch and Meta's package that check what they are given."""
    for name, text in STAND_IN.items():
        path = tmp_path / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return tmp_path / "package"


def test_rehearsal_with_the_reference(package, tmp_path):
    arguments = "--preset tiny --device cpu --tokens 16 --rounds 1 --intervals 2".split()
    arguments += "--solvers eigh --optimizers adamw shampoo_eigh_2_staggered".split()
    arguments += ["--block-size", "None"]
    out = tmp_path / "out"
    benchmark_step.main([*arguments, "--against", str(package), "--out", str(out)])
    result = json.loads((out / "results.json").read_text())
    found = {r["name"]: r for r in result["optimizers"]}
    assert list(found) == ["meta_2", "adamw", "shampoo_eigh_2_staggered"]
    assert not any("error" in r for r in found.values())
    ours = found["shampoo_eigh_2_staggered"]
    assert sum(ours[part] for part in PARTS) == pytest.approx(ours["step_s"])
    assert found["meta_2"]["to_adamw"] > 0 and "rest" not in found["meta_2"]
    assert result["model_s"] > 0 and 0 < ours["share"] < 1
    assert result["matrices"] == ["16x16", "16x64", "64x16"]
    assert (out / "steps.png").stat().st_size > 1000
    assert "| shampoo_eigh_2_staggered |" in (out / "table.md").read_text()


def test_what_the_reference_lacks_is_named(package, tmp_path):
    options = {"layers": 1, "width": 16, "every": 1, "block_size": 8, "rounds": 1, "device": "cpu"}
    with pytest.raises(ValueError, match="is no folder: name the one that holds Meta's"):
        measure_reference(str(tmp_path / "none"), options)
    (package / "torch.py").write_text("raise ImportError('No torch here')")
    with pytest.raises(ValueError, match="No torch here: pip install torch"):
        measure_reference(str(package), options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solvers": ("magic",)}, "solvers=.'magic'.: choose from .*eigh"),
        ({"intervals": (1, 0)}, r"intervals=\(1, 0\): must be at least 1"),
        ({"tokens": -1}, "tokens=-1: must be at least 0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        benchmark_step.Options(**options)


def test_an_unknown_optimizer_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="error: optimizers='adam_w' begins none of adamw, muon_5"):
        benchmark_step.main(["--tokens", "0", "--optimizers", "adam_w", "--out", str(tmp_path)])
