"""Rows of docs/hardware.md: made once, with a limit; what the model of scale takes of them."""

import json
import sys

import pytest

from nanogpt.train.rates import DEVICES
from scripts.maintenance import hardware_page, hardware_table, scaling_compiled, scaling_model
from scripts.maintenance.hardware_table import ROWS, Row


def program(flops, exchanges, **more):
    return {
        **{"cpu_s": 10.0, "short": 0, "peak": 2 << 30, "temporary": 1 << 30, "flops": flops},
        **{"exchanges": exchanges, "overlapped": {}, "calls": {}, "best_s": 0.1, "worst_s": 0.3},
        **more,
    }


def plan(**programs):
    return {
        **{"devices": 8, "memory": 8 << 30, "optimizer_state": 3 << 20, "programs": programs},
        "temporary": {"activations": 1 << 29, "gradient_sums": 1 << 28, "optimizer": 1 << 28},
    }


STEP = {
    "train": program(
        {"bf16": 5e12, "f32 highest": 7e9, "tf32_tf32_f32": 4e11},
        {"all-gather": [4, 8_000_000], "reduce-scatter": [1, 3_000_000]},
        overlapped={"all-gather": [1, 2_000_000]},
        calls={"cusolver_syevd_ffi": 4, "__cudnn$fmhaSoftmax": 2},
    ),
    "gradients": program({"bf16": 4.9e12}, {"reduce-scatter": [1, 3_000_000]}),
}
UPDATE = {"update": program({"bf16": 2e11, "f32 highest": 9e12}, {"all-gather": [2, 8_000_000]})}


@pytest.fixture
def command(tmp_path, monkeypatch):
    (tmp_path / "hardware.md").write_text("Before\n\n# Rows\n\nAfter\n".replace(
        "# Rows", "\n".join(hardware_page.MARKS)))  # fmt: skip
    asked = []

    def made(row, seconds):
        asked.append(row.name)
        label = {"row": row.name, **row._asdict(), "words": list(row.words)}
        if row.method == "SOAP":
            return label | {"failed": f"not finished in {seconds} processor seconds"}
        return label | plan(**(UPDATE if "update" in row.words else STEP))

    monkeypatch.setattr(hardware_table, "made", made)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["hardware_table", "--out", str(tmp_path), *words])
        asked.clear()
        hardware_table.main()
        return asked, (tmp_path / "hardware.md").read_text()

    return run


def test_rows_are_made_once_and_written_between_the_marks(command):
    asked, page = command("h100:8 | 124M | SOAP", "h100:8 | 124M | Shampoo, clip")
    assert len(asked) == 2
    assert page.startswith("Before\n") and page.rstrip().endswith("After")
    assert "| SOAP | not finished in 900 processor seconds |" in page
    cells = (
        *("Shampoo, clip", "6.0", "1.00", "0.50", "0.25", "3"),
        "100 bf16<br>7 f32 highest<br>400 tf32_tf32_f32",
        *("4 all-gather, 8.0<br>1 reduce-scatter, 3.0", "2.0", "4", "100.0 to 300", "20"),
    )
    assert f"| {' | '.join(cells)} |" in page
    again, same = command("h100:8 | 124M | SOAP", "h100:8 | 124M | Shampoo, clip")
    assert again == [] and same == page


def test_every_row_is_a_plan_of_its_own():
    assert len({row.name for row in ROWS}) == len(ROWS)
    one = Row("h100:1", "Shampoo, clip").plan
    assert one[one.index("--data.microbatch-rows") + 1] == "16"
    split = Row("h100:8", "AdamW", "350M", ("--data.microbatch-rows", "64")).plan
    assert split.count("--data.microbatch-rows") == 1 and "--model.num-layers" in split
    # What does not depend on the optimizer is compiled once for a table.
    whole = [row for row in ROWS if "--programs" not in row.plan]
    assert len({hardware_page.group(row._asdict()) for row in whole}) == len(whole) < len(ROWS) / 3


def test_a_row_takes_the_passes_of_another_of_its_table(tmp_path):
    label = {"target": "h100:8", "size": "124M", "words": []}
    more = {"train": STEP["train"] | {"temporary": 5 << 30}}
    gradients = STEP["gradients"] | {"temporary": 3 << 30}
    rows = [
        {"row": "b", "method": "b"} | label | plan(**more) | {"temporary": {}},
        {"row": "a", "method": "a"} | label | plan(**STEP | {"gradients": gradients}),
        {"row": "c", "method": "c"} | label | {"words": ["--x"]} | plan(**more),
    ]
    (tmp_path / "hardware.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = hardware_page.read_rows(tmp_path / "hardware.jsonl")
    assert found["b"]["temporary"]["optimizer"] == 2 << 30
    assert found["b"]["temporary"]["activations"] == 1 << 29
    assert hardware_page.of_optimizer(found["b"])["flops"]["bf16"] == pytest.approx(1e11)
    assert "gradients" not in found["c"]["programs"]


@pytest.mark.parametrize(
    ("words", "seconds", "expected"),
    [
        (["import json; print('noise'); print(json.dumps({'devices': 8}))"], 60, {"devices": 8}),
        (["import sys; sys.exit('error: a remedy')"], 60, {"failed": "error: a remedy"}),
        (["while True: pass"], 1, {"failed": "not finished in 1 processor seconds"}),
    ],
)
def test_a_row_says_why_there_is_none(words, seconds, expected, monkeypatch):
    monkeypatch.setattr(hardware_table, "COMMAND", [sys.executable, "-c", *words])
    found = hardware_table.made(ROWS[0], seconds)
    assert found["row"] == ROWS[0].name and expected.items() <= found.items()


def test_the_model_takes_what_compilers_found(tmp_path):
    rows = [
        {"target": "h100:8", "words": []} | plan(**STEP),
        {"target": "v5p:2x2x2", "words": ["--programs", "update"]} | plan(**UPDATE),
        {"target": "a100:8", "words": [], "failed": "does not compile"},
        {"target": "h100:1", "words": ["--largest-microbatch"]} | plan(**STEP),
    ]
    label = {"method": scaling_compiled.METHOD, "size": scaling_compiled.SIZE}
    lines = [json.dumps({"row": str(k)} | label | row) for k, row in enumerate(rows)]
    (tmp_path / "hardware.jsonl").write_text("\n".join(lines))
    cells = scaling_compiled.cells(tmp_path / "hardware.jsonl")
    h100 = DEVICES["H100 SXM"]
    # Of 8 MB that are gathered in a ring, 7 are sent on; the gradients' exchange is not the
    # optimizer's.
    step = {"statistics": 1e11, "bytes": 7e6, "others": 4e11, "seconds": 4e11 / h100.rest}
    assert cells == {
        "H100 SXM": {8: pytest.approx(step)},
        "TPU v5p": {8: {"statistics": 2e11, "bytes": 7e6}},
    }
    model = scaling_model.MODELS["GPT-2 124M"]
    known = scaling_model.predict(model, 8, h100, step)
    own = scaling_model.predict(model, 8, h100)
    assert known["statistics"] == pytest.approx(1e11 / h100.bfloat16 / 0.4)
    assert known["communication"] == pytest.approx(7e6 / 450e9 / 0.4)
    assert known["roots"] == pytest.approx((4e11 / h100.rest / 0.4 - own["apply"]) / 10)
    assert {known[k] == own[k] for k in ("apply", "state", "model")} == {True}
