"""The command `nanogpt plan`: its words, its process's environment, its page."""

import json
import sys

import pytest

from nanogpt.lab import plan
from nanogpt.train import plan as planned

RECORD = {
    "target": "h100:8",
    "devices": 8,
    "memory": 80 << 30,
    "run": "track3-shampoo",
    "mesh": "data=-1",
    "batch_rows": 512,
    "microbatch_rows": 128,
    "parameters": 1 << 30,
    "optimizer_state": 2 << 30,
    "temporary": {"activations": 4 << 30, "gradient_sums": 1 << 30, "optimizer": 3 << 19},
    "programs": {
        "train": {
            **{"compile_s": 29.4, "short": 0, "peak": 12 << 30, "temporary": 5 << 30},
            **{"flops": {"bf16": 4e12}, "exchanges": {"all-gather": (4, 3_000_000)}},
            **{"overlapped": {"all-gather": (3, 2_000_000)}},
            **{"calls": {"cusolver_syevd_ffi": 4}, "seconds": {"products": 0.004}},
            **{"best_s": 0.004, "worst_s": 0.01},
        },
        "evaluation": {"compile_s": 2.0, "short": 3 << 29},
    },
}


def test_the_page_says_whether_it_fits_and_by_how_much():
    text = plan.page(RECORD | {"largest_microbatch_rows": 256})
    for words in (
        "largest microbatch that fits: 256 rows",
        "track3-shampoo for h100:8: 8 devices, mesh data=-1, 128 of 512 rows at a time",
        "1.00 GiB of parameters and 2.00 GiB of optimizer state in 80.00 GiB",
        "memory      12.00 GiB at most, 68.00 GiB free",
        "products    4,000.0 GFLOP bf16",
        "exchanges   4 all-gather, 3.0 MB, beside products 3 of them, 2.0 MB",
        "4.00 GiB activations, 1.00 GiB sums of gradients, 1.50 MiB more for the optimizer",
        "calls       4 cusolver_syevd_ffi",
        "predicted   4.0 to 10.0 ms",
        "does NOT fit: 1.50 GiB missing",
    ):
        assert words in text


def test_the_process_of_a_target_has_its_libraries_where_they_are_looked_for(monkeypatch):
    started = []
    monkeypatch.delenv(plan.READY, raising=False)
    monkeypatch.setattr(sys, "prefix", "/env")
    monkeypatch.setattr(plan.os, "execve", lambda *words: started.append(words) or sys.exit())
    with pytest.raises(SystemExit):
        plan.main(["--target", "b200:8", "--layers", "2"])
    ((_, words, environment),) = started
    assert words[1:] == ["-m", "nanogpt", "plan", "--target", "b200:8", "--layers", "2"]
    assert "/env/compilers/cuda" in environment["PYTHONPATH"]
    assert "/env/compilers/cuda/nvidia/cudnn/lib" in environment["LD_LIBRARY_PATH"]
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert "/env/compilers/tpu" in plan.environment("v5e:2x4")["PYTHONPATH"]


def test_settings_reach_the_run_and_json_is_one_line(monkeypatch, capsys):
    asked = []
    monkeypatch.setenv(plan.READY, "1")
    monkeypatch.setattr(planned, "plan_run", lambda *given: asked.append(given) or RECORD)
    words = ["--target", "cpu:8", "--preset", "cpu", "--optimizer", "muon", "--layers", "1"]
    words += ["--programs", "update", "train"]
    plan.main([*words, "--json", "--data.microbatch-rows", "4"])
    ((config, _, programs, largest),) = asked
    assert not largest and programs == ("update", "train")
    assert (config.optimizer, config.model.num_layers, config.data.microbatch_rows) == (
        "muon",
        1,
        4,
    )
    assert json.loads(capsys.readouterr().out)["target"] == "h100:8"


def test_a_target_that_means_nothing_is_one_line(monkeypatch):
    monkeypatch.setenv(plan.READY, "1")
    with pytest.raises(SystemExit, match="error: target='h9:8'.*h100:8, or v5e:2x4"):
        plan.main(["--target", "h9:8"])
