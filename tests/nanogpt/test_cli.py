"""The command `nanogpt`: its help comes at once, whatever it would do."""

import importlib
import os
import signal
import subprocess
import sys

import pytest

from nanogpt import cli
from nanogpt.config.presets import PUBLISHED

COMMANDS = {name: command for group in cli.COMMANDS.values() for name, command in group.items()}
# Runs a command line in this process and says which slow packages it has imported by then.
IMPORTED = """
import sys
from nanogpt.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended.code
slow = {"jax", "matplotlib", "grain", "flax", "orbax"} & set(sys.modules)
assert not slow, slow
"""


@pytest.mark.parametrize("name", [(), *((name,) for name in COMMANDS)])
def test_help_imports_nothing_slow(name):
    """Time depends on the machine; what takes it are these packages."""
    command = [sys.executable, "-c", IMPORTED, *name, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: nanogpt" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_function(name):
    module, _, function = COMMANDS[name][0].partition(":")
    assert callable(getattr(importlib.import_module(f"nanogpt.lab.{module}"), function))


def test_help_lists_commands_and_where_optimizers_come_from(capsys):
    cli.main([])
    text = capsys.readouterr().out
    for name, (_, line) in COMMANDS.items():
        assert f"  {name:<18}{line}\n" in text
    for name, entry in PUBLISHED.items():
        assert f"  {name:<18}{entry.source}" in text


def test_an_unknown_command_is_answered_with_the_known_ones():
    with pytest.raises(SystemExit, match="error: 'trian' is no command: .*train"):
        cli.main(["trian"])


def test_training_needs_an_optimizer():
    with pytest.raises(SystemExit, match="--optimizer is missing: choose one of adamw, muon"):
        cli.main(["train", "--schedule.steps", "3"])


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--optimizer", "muon", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_enough_gets_no_traceback(arguments, unbuffered):
    """As in `nanogpt --help | head -1`: nobody reads any more when it writes."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "nanogpt", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, env=environment, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
