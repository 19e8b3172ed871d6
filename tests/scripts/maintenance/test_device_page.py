"""The page: what it says of a whole report, of half a one, and beside docs/scaling.md."""

import pytest

from scripts.maintenance.device import page, prediction
from scripts.maintenance.device.budget import PARTS

TEXT = prediction.PAGE.read_text(encoding="utf-8")
STEP = {"step_s": 0.04, "roots": 0.006, "apply": 0.012, "statistics": 0.0119, "rest": 0.0101}
FIGURES = {
    "probe": {
        "device": [
            {
                "kind": "NVIDIA H100 80GB HBM3",
                "platform": "gpu",
                "versions": {"jax": "0.11.2"},
                "commit": "0123456789abcdef",
                "memory_bytes": 6.3e10,
            }
        ],
        "choices": [{"name": "edge 768", "solver": "Polynomial", "first_products": "X3"}],
        "rates": [
            {"name": "float32, 1 x 8192", "seconds": 1, "flops_per_s": 50.175e12},
            {"name": "bfloat16, 1 x 8192", "seconds": 1, "flops_per_s": 791.5e12},
            {"name": "memory", "seconds": 1, "bytes_per_s": 3.015e12},
            {"name": "fp16, 1 x 8192", "error": "RuntimeError: no | such kernel"},
        ],
        "clock": [{"name": "after", "clocks.sm": "1980 MHz"}],
    },
    "numerics": {
        "roots": [{"name": "eigh, 768", "flat": {"cosine": 1.0, "error": 1e-6, "passed": True}}],
        "attention": [{"name": "cudnn", "output": 0.002, "dq": 0.003, "dk": 0.004, "dv": 0.005}],
        "recordings": [{"name": "01_root_nograft", "error_over_tolerance": 0.25}],
    },
    "step": {
        "model": [
            {"name": "forward and backward", "tokens": 65536, "seconds": 0.1, "flops": 4.947e13}
        ],
        "steps": [
            {"name": "muon_12_bfloat16", "every": 1, "step_s": 0.02, "rest": 0.002, "roots": 0.018},
            {"name": "shampoo_polynomial_10", "every": 10, **STEP},
            {"name": "soap_1", "error": "TimeoutError: not compiled in 99 s"},
        ],
    },
    "roots": {
        "roots": [
            {
                "name": "polynomial, DASH",
                "seconds": 0.031,
                "stacks": ["230 x 1024^2"],
                "passed": 229,
                "factors": 230,
            }
        ],
        "dash_step": [{"name": "step by polynomial", "step_s": 0.0625}],
    },
    "train_adamw": {
        "run": [{"optimizer": "AdamW, as published", "steps": 300, "rows": 32}],
        "window": [
            {"step": 10, "losses": [10.0, 11.0], "step_s": 9.0},
            {"step": 20, "losses": [8.0, 7.0], "step_s": 0.07},
        ],
        "memory": [{"peak_bytes": 31e9}],
    },
    "train_muon": {
        "window": [
            {"step": 2, "losses": [9.0, 8.0], "step_s": 0.07},
            {"step": 4, "losses": [7.0, 6.0], "step_s": 0.07},
        ],
    },
    "train_recipe": {
        "window": [
            {"step": 2, "losses": [9.0, 8.0], "step_s": 0.07},
            {"step": 4, "losses": [6.9, 5.7], "step_s": 0.07},
        ],
    },
    "precision": {
        "trials": [
            {
                "name": "statistics in TF32",
                "stage": "statistics",
                "precision": "TF32",
                "seconds": 0.002,
                "cosine": 0.9999996,
            },
            {
                "name": "roots in fp16",
                "stage": "roots",
                "precision": "fp16",
                "seconds": 0.004,
                "cosine": 0.99,
                "passed": 7,
                "of": 168,
            },
        ],
        "reference": [{"name": "float32", "cosine": 0.99995}],
    },
}


def result(*names, rehearsal=False):
    end = {"state": "done", "seconds": 5.0, "allotted_s": 9.0}
    done = {name: {**end, "figures": FIGURES[name]} for name in names}
    return {"minutes": 9, "seconds": 99.0, "rehearsal": rehearsal, "parts": done}


def rows(text):
    """The cells of all tables of a page, by first cell."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in lines}


@pytest.fixture(scope="module")
def whole():
    return page.render(result(*FIGURES))


def test_every_figure_is_on_the_page(whole):
    found = rows(whole)
    assert whole.startswith("# NVIDIA H100 80GB HBM3\n") and "revision 0123456789ab." in whole
    assert found["eigh, 768, flat"] == ["1.000000", "1e-06", "True"]
    assert found["cudnn"] == ["0.002", "0.003", "0.004", "0.005"]
    assert found["01_root_nograft"] == ["0.25"]
    step = found["shampoo_polynomial_10"]
    assert step[:7] == ["40", "6", "12", "11.9", "10.1", "2", "28.6"]
    assert found["polynomial, DASH"][:3] == ["230 x 1024^2", "31", "229 of 230"]
    assert found["step by polynomial"] == ["62.5"] and "119 ms (float16)" in whole
    assert found["statistics in TF32"] == ["2", "1.000000", "-"]
    assert found["roots in fp16"] == ["4", "0.990000", "7 of 168"]
    assert found["mean loss of 10 steps to"] == ["10", "20", "ms a step", "peak (GB)"]
    # The first window's time holds the first call.
    assert found["adamw"] == ["10.5000", "7.5000", "70", "31"]
    assert "second half: -0.2000 ± 0.1000 over 2 batches" in whole


def test_the_training_table_has_the_steps_of_all_runs():
    both = result("train_adamw")
    longer = [{"step": s, "losses": [9.0], "step_s": 0.1} for s in (10, 20, 50)]
    both["parts"]["train_muon"] = {"state": "done", "figures": {"window": longer}}
    found = rows(page.render(both))
    assert found["mean loss of 10 steps to"][:3] == ["10", "20", "50"]
    assert found["adamw"][:3] == ["10.5000", "7.5000", "-"] and found["muon"][2] == "9.0000"


def test_what_was_not_measured_says_why_and_breaks_no_table(whole):
    assert "* soap_1: TimeoutError: not compiled in 99 s" in whole
    assert "* fp16, 1 x 8192: RuntimeError: no / such kernel" in whole
    assert "soap_1" not in rows(whole)


def test_mfu_is_of_the_published_and_of_the_measured_rate(whole):
    # 494.7 TFLOP/s of 989.4 published and 791.5 measured.
    assert "50.0% of the published bfloat16 rate (MFU), 62.5% of a large product's" in whole


def test_prediction_and_measurement_stand_side_by_side(whole):
    found = rows(whole)
    assert found["float32 products"] == ["66.9", "26.76", "50.17", "0.75"]
    assert found["memory"] == ["3350", "1340", "3015", "0.90"]
    assert found["other products of a root (TF32)"][2:] == ["-", "-"]
    # An eighth of the 982 ms that are predicted for 2^19 tokens.
    assert found["forward and backward of 65536 tokens"] == ["123", "100", "0.81"]
    assert found["application"] == ["1.47", "12", "8.16"]
    assert found["roots"] == ["4.96", "6", "1.21"]


@pytest.mark.parametrize("count", range(len(FIGURES) + 1))
def test_half_a_report_has_a_page_too(count):
    text = page.render(result(*list(FIGURES)[:count]))
    titles = {part.name: part.title for part in PARTS}
    for i, name in enumerate(FIGURES):
        assert (f"| {titles[name]} | done |" in text) is (i < count)


def test_a_part_that_failed_is_named_with_its_error():
    failed = result("probe")
    failed["parts"]["step"] = {"state": "failed", "error": "XlaError: a |\nb", "figures": {}}
    assert rows(page.render(failed))["The optimizer's step on the matrices of GPT-2 124M"] == [
        *("failed", "-", "-"),
        "XlaError: a / b",
    ]


def test_a_rehearsal_says_so_and_predicts_nothing():
    text = page.render(result(*FIGURES, rehearsal=True))
    assert text.startswith("# A rehearsal") and "published rates of" not in text


def test_the_other_hopper_has_its_own_memory_and_the_firsts_times():
    first = prediction.predict("NVIDIA H100 80GB HBM3", TEXT)
    other = prediction.predict("NVIDIA H200", TEXT)
    assert (first.device, first.source) == ("H100 SXM", "H100 SXM")
    assert (other.device, other.source) == ("H200 SXM", "H100 SXM")
    assert other.peaks["memory"] == 4800 and other.step == first.step
    assert first.step["forward and backward"] == 982 and first.efficiency == 0.4
    assert prediction.predict("AMD EPYC, 2 cores", TEXT) is None


@pytest.mark.parametrize("kind", ["NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA A100 x"])
def test_a_device_that_the_prediction_does_not_know_gets_none_and_the_page_says_so(kind):
    assert prediction.predict(kind, TEXT) is None
    text = page.render(_of_kind(kind))
    assert f"has no prediction for {kind}." in text and "published rates of" not in text


def test_a_device_whose_step_is_not_predicted_has_its_rates_only():
    text = page.render(_of_kind("NVIDIA A100-SXM4-80GB"))
    assert "published rates of A100 SXM 80 GB. It predicts no step there." in text
    assert "(MFU)" in text and "predicted (ms)" not in text


def _of_kind(kind):
    other = result(*FIGURES)
    device = FIGURES["probe"]["device"][0] | {"kind": kind}
    other["parts"]["probe"]["figures"] = FIGURES["probe"] | {"device": [device]}
    return other


def test_a_page_of_another_form_is_refused():
    with pytest.raises(ValueError, match="no table under 'Rates of one device': has docs/scaling"):
        prediction.predict("NVIDIA H100", TEXT.replace("## Rates of one device", "## Rates"))
