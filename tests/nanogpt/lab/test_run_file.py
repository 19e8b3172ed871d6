"""Settings to and from files."""

import dataclasses
import json
import pathlib

import pytest
import yaml

from nanogpt.config.presets import PRESETS, preset
from nanogpt.lab import command_line, run_file, speedrun

EVERY = [(name, optimizer) for name, recipes in PRESETS.items() for optimizer in recipes]


@pytest.mark.parametrize(("name", "optimizer"), EVERY)
def test_what_is_printed_is_read_back(tmp_path, name, optimizer):
    config = dataclasses.replace(preset(name, optimizer), name="mine/run", seed=3)
    (tmp_path / "run.yaml").write_text(run_file.text(name, optimizer, config))
    options, rest = command_line.split_arguments(["--config", str(tmp_path / "run.yaml")])
    assert (options.preset, options.optimizer, rest) == (name, optimizer, [])
    assert command_line.read_config(options, optimizer, "x", rest) == config


def test_json_and_a_command_line_that_wins(tmp_path):
    settings = {"preset": "board", "optimizer": "soap", "schedule": {"steps": 7, "cooldown": 0.5}}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    words = ["--config", str(tmp_path / "run.json"), "--schedule.steps", "9"]
    options, rest = command_line.split_arguments([*words, "--scatter-gradients", "True"])
    config = command_line.read_config(options, options.optimizer, "x", rest)
    assert (config.schedule.steps, config.schedule.cooldown) == (9, 0.5)
    assert (config.name, config.optimizer, config.scatter_gradients) == ("x", "soap", True)
    options, _ = command_line.split_arguments([*words, "--optimizer", "muon"])
    assert options.optimizer == "muon"


def test_switches_and_values_of_none():
    default = preset("board", "muonh")
    settings = {"matrices": {"hyperball": False}, "scatter_gradients": True, "mesh": "data=-1"}
    assert run_file.words(settings, default) == [
        *("--matrices.no-hyperball", "--scatter-gradients", "True", "--mesh", "data=-1"),
    ]
    assert run_file.words({"scatter_gradients": None}, default) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "run.yaml: cannot be read"),
        ("a: [1", "run.yaml: is neither YAML nor JSON"),
        ("- 1\n- 2\n", "run.yaml: must hold names with values"),
        ("a: !!python/object/apply:os.getpid []\n", "run.yaml: is neither YAML nor JSON"),
        ("seed: 1\nname: x\nseed: 2\n", "neither YAML nor JSON: seed stands twice in one section"),
        ("optimizer: [1]\n", r"run.yaml: optimizer=\[1\]: must be a name"),
        ("preset: 5\n", "run.yaml: preset=5: must be a name"),
    ],
)
def test_what_is_no_file_of_settings_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit, match=message):
        speedrun.main(["--config", str(tmp_path / "run.yaml"), "--optimizer", "adamw"])


def test_an_unknown_setting_of_a_file_is_named(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("schedule: {stepz: 3}\n")
    with pytest.raises(SystemExit):
        speedrun.main(["--config", str(tmp_path / "run.yaml"), "--optimizer", "adamw"])
    assert "--schedule.stepz" in capsys.readouterr().err


def test_printing_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    speedrun.main(["--optimizer", "muon", "--schedule.steps", "5", "--print-config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optimizer"] == "muon" and printed["schedule"]["steps"] == 5
    assert not list(pathlib.Path().iterdir())
    with pytest.raises(
        SystemExit, match="--print-config is about one optimizer: name it by --optimizer"
    ):
        speedrun.main(["--print-config"])
