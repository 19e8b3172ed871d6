"""The command `nanogpt`: its subcommands, each imported when it is called."""

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from nanogpt.config.presets import PUBLISHED

# By group: a command's function, module:name in nanogpt.lab, and one line of help.
COMMANDS = {
    "Train": {
        "demo": ("speedrun:main", "AdamW, Muon and Shampoo on the same text, and a picture"),
        "train": ("speedrun:train_command", "one optimizer, one seed or several"),
        "sweep": ("search:sweep", "many runs that differ in a few settings"),
        "board": ("search:board", "every optimizer at a small size, tuned"),
    },
    "Look": {
        "compare": ("look:compare", "draw any runs and published curves"),
        "report": ("look:report", "one HTML file about one run or several"),
        "spectrum": ("look:spectrum", "factors of a run trained with --monitor"),
        "verdict": ("look:verdict", "what sets of runs prove"),
        "records": ("look:records", "the board of track 3 as published"),
    },
    "Use": {
        "sample": ("use:sample", "text from a trained model"),
        "evaluate": ("use:evaluate", "its loss on any shards, with a standard error"),
        "export": ("use:export", "its weights as safetensors, for other programs"),
    },
    "Prepare": {
        "plan": ("plan:main", "compile a run for GPUs or TPUs that are not here"),
        "data": ("data:main", "token shards of your text, or the benchmark's"),
        "import-meta": ("import_meta:main", "a state of Meta's DistributedShampoo as one of ours"),
    },
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; where its reader ends, as `head` does, it ends without a word."""
    try:
        try:
            run(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()  # not when Python exits, where nobody can catch what comes of it
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def run(arguments: Sequence[str]) -> None:
    """Gives a command its arguments."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(help_text())
        return
    commands = {key: value for group in COMMANDS.values() for key, value in group.items()}
    if name not in commands:
        sys.exit(f"error: {name!r} is no command: choose one of {', '.join(commands)}.")
    module, _, function = commands[name][0].partition(":")
    getattr(importlib.import_module(f"nanogpt.lab.{module}"), function)(rest)


def help_text() -> str:
    """Returns the commands by group, and the optimizers of track 3 with their sources."""
    lines = ["usage: nanogpt COMMAND ..., nanogpt COMMAND --help"]
    for group, commands in COMMANDS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {name:<18}{line}" for name, (_, line) in commands.items()]
    lines += ["", "Optimizers (--optimizer of train), with the source of their settings:"]
    lines += [f"  {name:<18}{entry.source}" for name, entry in PUBLISHED.items()]
    return "\n".join(lines)
