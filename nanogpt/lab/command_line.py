"""The command line of a run: which one, from where its settings come, every setting a flag."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from nanogpt.config.prepared import fitted
from nanogpt.config.presets import preset
from nanogpt.config.run import Config
from nanogpt.config.settings import check
from nanogpt.lab import run_file

DEMO = ("adamw", "muon", "shampoo_next")
DESCRIPTION = """Trains one optimizer; --seeds N trains it N times and applies the benchmark's rule.

Every setting below can be changed; the values shown are those of the preset. `--optimizer shampoo
--help` shows that optimizer's own settings, --matrices.*, in the place of AdamW's.
"""
NAMES: dict[str, Any] = {"prog": "nanogpt train", "description": DESCRIPTION}


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which run, and how it is started."""

    # Complete set of settings.
    preset: Literal["track3", "medium", "cpu", "board", "board_m", "medium_board"] = "cpu"
    optimizer: str | None = None  # train this one alone; demo without it: its three, one by one
    seeds: int | None = None  # train it so many times, from seeds 0, 1, ..., and judge them all
    # Loss that the runs are to prove (nats; of track3: 3.28, of medium: 2.92)
    target: float | None = None
    config: str | None = None  # file with settings in YAML or JSON
    print_config: bool = False  # print all settings in YAML, train nothing
    resume: bool = False  # go on from the newest checkpoints, bit for bit
    previous_good: bool = False  # with --resume: from the newest ones that are undamaged
    overwrite: bool = False  # delete earlier runs of the same name
    coordinator_address: str | None = None  # of several processes: HOST:PORT of the first one
    num_processes: int | None = None  # of several processes: how many
    process_id: int | None = None  # of several processes: this one, from 0
    distributed: bool = False  # one of several processes; let jax ask which

    def __post_init__(self):
        check(self, "positive and finite", "target")
        if self.previous_good and not self.resume:
            raise ValueError("previous_good=True starts no run: say --resume=previous-good.")

    @property
    def how_resumed(self) -> bool | Literal["previous-good"]:
        """What `nanogpt.train.loop.fit` is told."""
        return "previous-good" if self.previous_good else self.resume

    @property
    def process(self) -> dict[str, Any]:
        """What it says about this process; see `nanogpt.train.distributed`."""
        names = ("coordinator_address", "num_processes", "process_id")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """All that `--help` explains."""

    choice: Annotated[tyro.conf.FlagCreatePairsOff[Choice], tyro.conf.arg(name="")]
    config: Annotated[Config, tyro.conf.arg(name="")]


def split_arguments(words: Sequence[str]) -> tuple[Choice, list[str]]:
    """Separates what chooses a run from the settings of `Config`.

    A file of settings may name preset and optimizer, too.

    >>> split_arguments(["--resume=previous-good"])[0].how_resumed
    'previous-good'
    >>> choice, rest = split_arguments(["--optimizer", "muon", "--seed", "1"])
    >>> choice.preset, choice.optimizer, rest
    ('cpu', 'muon', ['--seed', '1'])
    >>> split_arguments(["--monitor", "10"])[1]
    ['--matrices.monitor', '10']
    """
    # A flag of tyro's has a value or has none.
    both = {"--resume=previous-good": ("--resume", "--previous-good")}
    words = [re.sub("^--monitor(?==|$)", "--matrices.monitor", word) for word in words]
    words = [part for word in words for part in both.get(word, (word,))]

    def read(default: Choice) -> tuple[Choice, list[str]]:
        return tyro.cli(
            tyro.conf.FlagCreatePairsOff[Choice], prog="nanogpt train", args=words,
            default=default, return_unknown_args=True, add_help=False,
        )  # fmt: skip

    choice, rest = read(Choice())
    return read(Choice(**run_file.chosen(choice.config))) if choice.config else (choice, rest)


def all_words(choice: Any, optimizer: str, rest: Sequence[str]) -> list[str]:
    """Returns the settings of the file and of the command line, which win, as words."""
    settings = run_file.read(choice.config) if choice.config else {}
    return [*run_file.words(settings, preset(choice.preset, optimizer)), *rest]


def read_config(choice: Any, optimizer: str, name: str, rest: Sequence[str]) -> Config:
    """Returns the preset with the settings of the file and of the command line in it.

    Args:
        choice: a `Choice`, or something else with a `preset` and the `config` file.
        optimizer: which of the preset's recipes.
        name: of the run, unless the settings name it.
        rest: settings, as in ["--schedule.steps", "100"]; they win over the file's.

    Raises:
        ValueError: a file that cannot be read, an unknown preset or optimizer.
    """
    words = all_words(choice, optimizer, rest)
    default = fitted(dataclasses.replace(preset(choice.preset, optimizer), name=name), words)
    if {"-h", "--help"} & set(words):
        line = CommandLine(choice, default)
        tyro.cli(tyro.conf.AvoidSubcommands[CommandLine], default=line, args=words, **NAMES)
    return tyro.cli(tyro.conf.AvoidSubcommands[Config], default=default, args=words, **NAMES)
