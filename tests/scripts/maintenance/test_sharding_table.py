"""What is planned from shapes is what the compiled program does."""

import json
import sys

import pytest

from scripts.maintenance import sharding_table as st


@pytest.mark.parametrize("layout", ["replicated", "rows"])
def test_the_plan_is_what_the_compiler_does(layout):
    found = st.measure(st.LAYOUTS[layout], st.gpt2_shapes(2, 16), momentum=0.9)
    assert found["state_bytes_per_device"] == found["planned_state_bytes_per_device"]
    exchanges, planned = found["exchanges"], found["planned"]
    assert exchanges.pop("all-reduce", (0, 0))[1] < 64  # of flags alone
    assert exchanges == planned
    # The update is gathered once, though momentum comes after the way back of blocks.
    assert exchanges.get("all-gather", (0, 0))[1] <= found["parameter_bytes"]


def test_a_device_decomposes_its_own_blocks():
    params = st.gpt2_matrices(4, 16)  # 16 of 16x16 and 8 of 64x16
    assert st.decomposed_on_gpu(8, params) == ["1x16x16", "1x64x64", "2x16x16"]


def test_compile_time_is_told():
    found = st.compile_seconds(st.LAYOUTS["replicated"], st.gpt2_shapes(1, 16, 32))
    assert found["parameters"] == 12 * 16 * 16 + 32 * 16 + 16
    assert found["compile_s"] > 0 and set(found["exchanges"]) == {"all-gather"}


def test_parts_of_the_page_are_written_one_after_the_other(tmp_path, monkeypatch, capsys):
    record = dict(
        exchanges={"all-gather": (2, 4096)},
        planned={"all-gather": (2, 4096)},
        temporary_bytes=10,
        parameter_bytes=20,
        state_bytes=800,
        state_bytes_per_device=100,
    )
    timed = dict(record, parameters=5, trace_s=1.0, compile_s=2.0, cpu_s=3.0, program_kb=4)
    monkeypatch.setattr(st, "measure", lambda *args, **options: record)
    monkeypatch.setattr(st, "working_memory", lambda *args: {"moves": 1024, "direction": 2048})
    monkeypatch.setattr(st, "decomposed_on_gpu", lambda *args: ["2x8x8"])
    monkeypatch.setattr(st, "compile_seconds", lambda *args, **options: timed)
    monkeypatch.setattr(st, "equality", lambda: iter([("rows", {"eigh": 2e-15})]))
    monkeypatch.setattr(st, "compare", lambda *args: iter([("rows", {"eigh": 3e-7})]))
    for option in ([], ["--equality"], ["--compile"]):
        monkeypatch.setattr(sys, "argv", ["sharding_table", "--out", str(tmp_path), *option])
        st.main()
    page = (tmp_path / "sharding.md").read_text()
    for line in (
        "| rows | 2 all-gather 4,096 | 2 all-gather 4,096 | 10 | 100 | 0.1250 |",
        "| rows | 2e-15 |",
        "| rows | 3e-07 |",
        "| 1.3B, rows | 1.0 | 2.0 | 3.0 | 4 | 0 | 0.50 | 2 all-gather 4,096 |",
    ):
        assert line in page
    results = json.loads((tmp_path / "sharding.json").read_text())
    assert results["eigh_operands_on_8_gpus"] and results["equality"] and results["compile"]
