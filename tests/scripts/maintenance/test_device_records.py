"""Figures survive whatever happens to the process that measures them."""

import pytest

from scripts.maintenance.device.records import Recorder, read


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
