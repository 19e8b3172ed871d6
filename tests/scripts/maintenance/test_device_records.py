"""Figures survive whatever happens to the process that measures them."""

import dataclasses

import numpy as np
import pytest

from scripts.maintenance.device import training
from scripts.maintenance.device.records import Recorder, read
from scripts.maintenance.device.sizes import REHEARSAL


@pytest.fixture
def recorder(tmp_path):
    return Recorder(tmp_path / "part.jsonl", 10.0, clock=lambda: 0.0)


def test_rows_come_back_by_group_and_a_line_that_was_cut_off_is_left_out(tmp_path, recorder):
    recorder.add("rates", name="a", seconds=1.5)
    recorder.add("device", kind="x")
    recorder.add("rates", name="b", seconds=2)
    path = tmp_path / "part.jsonl"
    path.write_text(path.read_text() + '{"group": "rates", "na')
    expected = [{"name": "a", "seconds": 1.5}, {"name": "b", "seconds": 2}]
    assert read(path) == {"rates": expected, "device": [{"kind": "x"}]}


def test_a_part_that_wrote_nothing_has_no_figures(tmp_path):
    assert read(tmp_path / "none.jsonl") == {}


def test_a_failure_is_recorded_and_the_next_measurement_taken(tmp_path, recorder):
    def fail():
        raise ValueError("edge=3: must be even." + "x" * 5000)

    recorder.attempt("roots", "bad", fail)
    recorder.attempt("roots", "good", lambda: {"seconds": 1.0})
    bad, good = read(tmp_path / "part.jsonl")["roots"]
    assert bad["error"].startswith("ValueError: edge=3: must be even.") and len(bad["error"]) < 700
    assert good == {"name": "good", "seconds": 1.0}


def test_nothing_is_measured_when_the_time_is_over(tmp_path):
    ticks = iter([0.0, 11.0])
    late = Recorder(tmp_path / "late.jsonl", 10.0, clock=lambda: next(ticks))
    late.attempt("roots", "eigh", lambda: pytest.fail("it was measured"))
    assert read(tmp_path / "late.jsonl")["roots"] == [
        {"name": "eigh", "error": "not measured: the part's time was over"}
    ]


@pytest.mark.parametrize(("seconds", "steps", "cut"), [(0.0, 10, True), (1e9, 20, False)])
def test_training_that_is_cut_by_time_says_after_which_step(
    tmp_path, monkeypatch, seconds, steps, cut
):
    sizes = dataclasses.replace(REHEARSAL, steps=20)
    shape = (sizes.steps, sizes.train_rows, sizes.length + 1)
    np.save(tmp_path / training.TEXT, np.zeros(shape, np.uint16))
    monkeypatch.setattr(training, "init_state", lambda *_: (None, 0))
    monkeypatch.setattr(training, "make_train_step", lambda *_: None)
    step = (lambda state, batch: (state, {"loss": 1.0}), {})
    monkeypatch.setattr(training, "compile_function", lambda *_, **__: step)
    training.run("train_adamw", Recorder(tmp_path / "part.jsonl", seconds), sizes, tmp_path)
    figures = read(tmp_path / "part.jsonl")
    assert figures["window"][-1]["step"] == steps
    error = "the part's time was over after 10 of 20 steps"
    assert figures.get("cut", []) == ([{"name": "train_adamw", "error": error}] if cut else [])
