"""The command line of a run: which one, from where its settings come, every setting a flag."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import tyro

from nanogpt.config.prepared import fitted
from nanogpt.config.presets import PRESETS, preset
from nanogpt.config.run import Config
from nanogpt.lab import run_file

DEMO = ("adamw", "muon", "shampoo")
PROGRAM = "nanogpt train"
DESCRIPTION = """Trains one optimizer; --seeds N trains it N times and applies the benchmark's rule.

Every setting below can be changed; the values shown are those of the preset. `--optimizer shampoo
--help` shows that optimizer's own settings, --matrices.*, in the place of AdamW's.
"""


def split_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Separates what chooses a run from the settings of `Config`, which tyro parses.

    A file of settings may name preset and optimizer, too.

    >>> options, rest = split_arguments(["--optimizer", "muon", "--seed", "1"])
    >>> options.preset, options.optimizer, rest
    ('cpu', 'muon', ['--seed', '1'])
    """
    parser = _parser()
    file = parser.parse_known_args(arguments)[0].config
    if file:
        parser.set_defaults(**run_file.chosen(run_file.read(file)))
    return parser.parse_known_args(arguments)


def process_flags(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says about this process; see `nanogpt.train.distributed`."""
    names = ("coordinator_address", "num_processes", "process_id")
    return {name: getattr(options, name) for name in names}


def read_config(options: Any, optimizer: str, name: str, rest: list[str]) -> Config:
    """Returns the preset with the settings of the file and of the command line in it.

    Args:
        options: from `split_arguments`, or others with a `preset` and the `config` file.
        optimizer: which of the preset's recipes.
        name: of the run, unless the settings name it.
        rest: settings, as in ["--schedule.steps", "100"]; they win over the file's.

    Raises:
        ValueError: a file that cannot be read, an unknown preset or optimizer.
    """
    default = dataclasses.replace(preset(options.preset, optimizer), name=name)
    settings = run_file.read(options.config) if options.config else {}
    words = [*run_file.words(settings, default), *rest]
    return tyro.cli(
        tyro.conf.AvoidSubcommands[Config],
        prog=PROGRAM,
        description=f"{DESCRIPTION}\n{_parser().format_help()}",
        default=fitted(default, words),
        args=words,
    )


def flags(options: argparse.Namespace, **changed: object) -> list[str]:
    """The command line that gives these options, some of them changed.

    >>> flags(split_arguments(["--optimizer", "muon", "--resume"])[0], seeds=2, resume=False)
    ['--preset', 'cpu', '--optimizer', 'muon', '--seeds', '2']
    """
    words = []
    for name, value in (vars(options) | changed).items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def _loss(text: str) -> float:
    """A loss that runs can prove."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no loss: give a positive number of nats.")
    return value


def _parser() -> argparse.ArgumentParser:
    """What chooses a run. No abbreviations: --opt could be meant for tyro."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument(
        "--preset", choices=PRESETS, default="cpu", help="complete set of settings (default: cpu)"
    )
    parser.add_argument(
        "--optimizer", help=f"train this one alone (default: {', '.join(DEMO)}, one by one)"
    )
    parser.add_argument(
        "--seeds", type=int, help="train it so many times, from seeds 0, 1, ..., and judge them all"
    )
    # For the runs that --seeds starts: one run's verdict would be taken for that of them all.
    parser.add_argument("--one-of-seeds", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--target", type=_loss, help="loss that the runs are to prove (nats; of track3: 3.28)"
    )
    parser.add_argument("--config", metavar="FILE", help="settings in YAML or JSON")
    parser.add_argument(
        "--print-config", action="store_true", help="print all settings in YAML, train nothing"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoints, bit for bit"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete earlier runs of the same name"
    )
    parser.add_argument(
        "--coordinator-address", help="of several processes: HOST:PORT of the first one"
    )
    parser.add_argument("--num-processes", type=int, help="of several processes: how many")
    parser.add_argument("--process-id", type=int, help="of several processes: this one, from 0")
    parser.add_argument(
        "--distributed", action="store_true", help="one of several processes; let jax ask which"
    )
    return parser
