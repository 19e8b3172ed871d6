"""The log in the benchmark's layout."""

import dataclasses
import json
import math
import os
import pathlib
import re
import sys
import types

import jax
import pytest

from nanogpt.config.presets import preset
from nanogpt.config.run import ScheduleConfig
from nanogpt.train import record_log
from nanogpt.train.record_log import RULE, RecordLog, environment_text, record_line, source_text

CONFIG = dataclasses.replace(preset("track3", "shampoo"), schedule=ScheduleConfig(3375))


@pytest.mark.parametrize(
    ("numbers", "published"),
    [
        (
            (0, 10.825838, 0.0, math.nan),
            "step:0/3375 val_loss:10.82584 train_time:0.000s step_avg:nanms",
        ),
        (
            (3375, 3.276748, 1633.268, 0.478737),
            "step:3375/3375 val_loss:3.27675 train_time:1633.268s step_avg:478.74ms",
        ),
    ],
)
def test_a_line_is_the_published_one(numbers, published):
    """Two lines of the log of result #35."""
    step, loss, seconds, step_s = numbers
    assert record_line(step, 3375, loss, seconds, step_s) == published


def test_source_is_complete_and_in_order():
    root = pathlib.Path(__file__).parents[3]
    names = [
        line[7:-5]
        for line in source_text().splitlines()
        if line.startswith("# ==== ") and line.endswith(" ====")
    ]
    packages = ("nanogpt", "shampoo_jax", "data_pipeline")
    files = [p for package in packages for p in sorted((root / package).rglob("*.py"))]
    wanted = [f.relative_to(root).as_posix() for f in files]
    assert names[names.index("nanogpt/__init__.py") :] == wanted
    assert (root / "shampoo_jax" / "blocks" / "blocks.py").read_text() in source_text()


def test_no_line_of_the_source_is_read_as_a_loss():
    """The benchmark's own plots search for this anywhere in a line of a log."""
    loss = re.compile(r"step:(\d+)/(\d+)\s+val_loss:([0-9.]+)")
    assert loss.search(record_line(125, 3375, 4.81815, 52.99, 0.42392))
    assert not list(filter(loss.search, source_text().splitlines()))


def test_source_begins_with_a_program_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("my_optimizer = 1\n")
    program = types.SimpleNamespace(__file__=str(tmp_path / "mine.py"))
    monkeypatch.setitem(sys.modules, "__main__", program)
    assert source_text().startswith("# ==== mine.py ====\nmy_optimizer = 1\n\n# ==== nanogpt/")


@pytest.fixture
def log(tmp_path):
    return tmp_path / "record.txt"


def sections(text: str) -> list[list[str]]:
    """Lines between the rules."""
    return [part.strip("\n").splitlines() for part in text.split(f"\n{RULE}\n")]


def test_layout_of_a_whole_log(log, monkeypatch):
    monkeypatch.setattr(record_log, "devices_text", lambda: "GPU 0\nGPU 1")
    record = RecordLog(log, CONFIG, "import this", None)
    record.write("val", step=0, loss=math.log(50304), train_time_s=0.0)
    record.write("val", step=125, loss=4.81815, train_time_s=52.99)
    record.write("val", step=250, loss=4.1979, train_time_s=112.426)
    source, machine, losses = sections(log.read_text())
    assert source == ["import this"]
    assert machine[0].startswith(f"Running JAX {jax.__version__} (cpu) on ")
    assert machine[0].endswith(f"with world_size {jax.device_count()}")
    assert machine[-2:] == ["GPU 0", "GPU 1"]
    (config,) = (line for line in machine if line.startswith("config "))
    assert json.loads(config.removeprefix("config "))["schedule"]["steps"] == 3375
    assert losses == [
        "step:0/3375 val_loss:10.82584 train_time:0.000s step_avg:nanms",
        "step:125/3375 val_loss:4.81815 train_time:52.990s step_avg:423.92ms",
        "step:250/3375 val_loss:4.19790 train_time:112.426s step_avg:475.49ms",
    ]


def test_resumed_log_has_every_step_once_and_the_time_goes_on(log):
    record = RecordLog(log, CONFIG, "code", None)
    for step in (0, 125, 250, 375):
        record.write("val", step=step, loss=5.0, train_time_s=step / 10)
    with log.open("a") as file:
        file.write("step:500/3375 val_lo")  # cut short by a crash
    before = log.read_text()
    record = RecordLog(log, CONFIG, "code", 250)
    record.write("val", step=250, loss=4.0, train_time_s=25.5)
    record.write("val", step=375, loss=3.5, train_time_s=50.5)
    kept = before[: before.index("step:250/")]
    assert log.read_text() == kept + (
        "Resumed after 250 updates\n"
        "step:250/3375 val_loss:4.00000 train_time:25.500s step_avg:104.00ms\n"
        "step:375/3375 val_loss:3.50000 train_time:50.500s step_avg:200.00ms\n"
    )


@pytest.mark.parametrize("lost", [False, True])
def test_other_code_is_told_when_it_goes_on(log, lost):
    RecordLog(log, CONFIG, "old", None).write("val", step=0, loss=5.0, train_time_s=0.0)
    if lost:
        log.unlink()
    RecordLog(log, CONFIG, "new", 3).write("val", step=125, loss=4.0, train_time_s=6.1)
    assert sections(log.read_text())[-3][-1] == "new"
    assert log.read_text().count(RULE) == (2 if lost else 4)
    assert environment_text(CONFIG) in log.read_text()
    assert "Resumed after 3 updates" in log.read_text()


def test_a_pipe_in_the_place_of_the_log_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "record.txt")
    RecordLog(tmp_path / "record.txt", CONFIG, "source", 3)
    assert "Resumed after 3 updates" in (tmp_path / "record.txt").read_text()
