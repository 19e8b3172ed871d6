"""TensorBoard and Weights & Biases get what metrics.jsonl gets; neither needs a network."""

import dataclasses
import importlib.util
import warnings

import pytest

from nanogpt.config.run import OutputConfig, ScheduleConfig
from nanogpt.train.loop import fit
from nanogpt.train.run_folder import RunFolder
from tests.nanogpt.train.test_loop import records, shards, tiny

__all__ = ["shards"]  # a fixture


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag of the only event file: records of length, checksum, event, checksum."""
    from tensorboardX.proto import event_pb2

    found: dict[str, list[tuple[int, float]]] = {}
    (path,) = folder.glob("events.*")
    data = path.read_bytes()
    while data:
        size = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


@pytest.fixture
def config(shards, tmp_path, monkeypatch):
    """A short run that writes to all sinks."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    output = OutputConfig(str(tmp_path), log_every=1, sinks=("tensorboard", "wandb"))
    return tiny(shards, tmp_path, "a/b", output=output, schedule=ScheduleConfig(3))


def test_every_sink_gets_the_records(config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their packages' own
        fit(config)
    folder = RunFolder(config).path
    found = scalars(folder / "tensorboard")
    losses = [(r["step"], pytest.approx(r["loss"])) for r in records(config, "train")]
    assert found["train/loss"] == losses and len(found["val/loss"]) == 2
    logs = list((folder / "wandb").glob("offline-run-*/run-a-b.wandb"))
    assert len(logs) == 1 and logs[0].stat().st_size > 1000


def test_a_package_that_is_missing_is_named_before_anything_else(config, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "wandb" else find(n))
    nowhere = dataclasses.replace(config.data, directory="nowhere")
    with pytest.raises(ValueError, match="output.sinks='wandb'.*pip install wandb"):
        fit(dataclasses.replace(config, data=nowhere))
