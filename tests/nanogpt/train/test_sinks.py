"""TensorBoard and Weights & Biases get what metrics.jsonl gets; neither needs a network."""

import dataclasses
import importlib.util
import sys
import types
import warnings

import pytest

from nanogpt.config.run import OutputConfig, ScheduleConfig
from nanogpt.train import sinks
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
    (log,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert log.stat().st_size > 1000
    named = log.stem.removeprefix("run-")
    assert named == RunFolder(config).wandb.read_text()


def test_a_new_run_of_the_name_does_not_mix_with_the_old_one(shards, tmp_path, monkeypatch):
    """A resumed one does: its id is the same, and its events are added."""
    ids = iter(("first", "second", "third"))

    class Run:
        def __init__(self, id=None, **_):
            self.id = id or next(ids)
            self.config = types.SimpleNamespace(update=lambda *_, **__: None)

        log = finish = lambda *_: None

    fake = types.SimpleNamespace(init=Run, login=lambda **_: None, Error=Exception)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(sinks, "PACKAGES", dict.fromkeys(sinks.PACKAGES, "json"))
    output = OutputConfig(str(tmp_path), sinks=("wandb",))
    config = tiny(shards, tmp_path, output=output, schedule=ScheduleConfig(1))
    folder = RunFolder(config)
    fit(config)
    folder.events.mkdir()
    (folder.events / "events.old").touch()
    sinks.open_sinks(config, 1)
    assert folder.wandb.read_text() == "first" and (folder.events / "events.old").exists()
    fit(config, overwrite=True)
    assert folder.wandb.read_text() == "second" and not folder.events.exists()


def test_a_server_that_refuses_is_found_before_anything_else(config, monkeypatch):
    class Refused(Exception):
        pass

    def login(**_):
        raise Refused("No API key configured.")

    fake = types.SimpleNamespace(login=login, Error=Refused)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(sinks, "PACKAGES", dict.fromkeys(sinks.PACKAGES, "json"))
    with pytest.raises(ValueError, match="No API key configured. Or set WANDB_MODE=offline"):
        fit(config)
    assert not RunFolder(config).path.exists()


def test_a_package_that_is_missing_is_named_before_anything_else(config, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "wandb" else find(n))
    nowhere = dataclasses.replace(config.data, directory="nowhere")
    with pytest.raises(ValueError, match="output.sinks='wandb'.*pip install wandb"):
        fit(dataclasses.replace(config, data=nowhere))
