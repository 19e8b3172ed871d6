"""metrics.jsonl and what is shown while a run goes on."""

import contextlib
import io
import json
import math
import os

import pytest
import rich.console

from nanogpt.train.metrics import MetricsWriter, Progress, keep_before, read_records


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_every_record_is_on_disk_at_once(path):
    writer = MetricsWriter(path)
    writer.write("train", step=0, loss=1.5)
    assert path.read_text() == '{"kind": "train", "step": 0, "loss": 1.5}\n'
    writer.close()


def test_writer_appends(path):
    for step in (0, 1):
        writer = MetricsWriter(path)
        writer.write("val", step=step)
        writer.close()
    assert read_records(path) == [{"kind": "val", "step": 0}, {"kind": "val", "step": 1}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(path, value):
    writer = MetricsWriter(path)
    writer.write("train", step=3, loss=value)
    writer.close()
    assert json.loads(path.read_text()) == {"kind": "train", "step": 3, "loss": None}


def test_last_line_may_be_cut_short(path):
    path.write_text('{"kind": "start"}\n{"kind": "tr')
    assert read_records(path) == [{"kind": "start"}]


def test_damage_elsewhere_is_named(path):
    path.write_text('{"kind": "start"}\n{"ki\n{"kind": "end"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_records(path)


def test_keep_before_cuts_what_the_resumed_run_writes_again(path):
    start, rest = {"kind": "start"}, [{"kind": "val", "step": s} for s in (0, 4, 5, 6)]
    records = [start, *rest, {"kind": "resume", "step": 5}, {"kind": "end", "step": 9}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    keep_before(path, 5, {"seed": 1})
    assert read_records(path) == [start | {"config": {"seed": 1}}, *rest[:2]]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


FIGURES = {
    "loss": 3.25,
    "learning_rate": 0.00123,
    "tokens_per_s": 12345.6,
    "step_time_s": 4.0,
    "mfu": 0.4123,
    "peak_memory_bytes": 2.34e9,
    "skipped": 2,
    "eta_s": 990 * 4.0,
}


def shown(terminal: bool) -> str:
    screen = io.StringIO()
    console = rich.console.Console(
        file=screen, force_terminal=terminal, width=160, soft_wrap=True, highlight=False
    )
    progress = Progress("cpu/[muon]", steps=2000, done=1000, console=console)
    with contextlib.closing(progress):
        progress.advance(1009, FIGURES)
        progress.write("train", step=1009, **FIGURES)
        progress.write("val", step=1009, loss=3.5, train_time_s=1.0, bits_per_byte=1.25)
        progress.note("hello")
    return screen.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    assert shown(terminal=False) == (
        "cpu/[muon]: step 1009/2000  loss 3.2500  lr 0.00123  12,346 tokens/s  4000 ms/step  "
        "MFU 41.2%  2.3 GB  2 skipped  ETA 1:06:00\n"
        "cpu/[muon]: step 1009: validation loss 3.50000 nats per token, 1.2500 bits per byte\n"
        "cpu/[muon]: hello\n"
    )


def test_bar_on_a_terminal():
    text = shown(terminal=True)
    for figure in ("cpu/[muon]", "1010/2000", "loss 3.2500", "12,346 tokens/s", "41.2%", "ETA"):
        assert figure in text
    assert "step 1009/" not in text
    assert "hello" in text


def test_a_process_more_than_before_begins_its_records(tmp_path):
    keep_before(tmp_path / "metrics-2.jsonl", 7, {})
    assert read_records(tmp_path / "metrics-2.jsonl") == []


def test_records_that_are_no_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics.jsonl is no file"):
        read_records(tmp_path / "metrics.jsonl")
