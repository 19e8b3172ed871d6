"""Trains one optimizer after another on the same batches and draws the comparison.

Without --optimizer: AdamW, Muon and Shampoo, each in a process of its own. Every setting below can
be changed; the values shown are those of the preset. `--optimizer shampoo --help` shows that
optimizer's own settings, --matrices.*, in the place of AdamW's.
"""

import argparse
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import tyro

from data_pipeline import gpt2, prepare, sotu
from data_pipeline.manifest import FILE_NAME
from data_pipeline.tokenizer import GPT2_VOCAB_SIZE
from nanogpt.comparison import compare
from nanogpt.config import Config
from nanogpt.presets import PRESETS, preset
from nanogpt.run_folder import RunFolder

DEMO = ("adamw", "muon", "shampoo")
PROGRAM = "python -m scripts.speedrun"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    # OpenBLAS spins a thread pool for every decomposition, which is slower on few cores; it reads
    # this when jax is first imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    options, rest = split_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.optimizer is not None:
            train(options, rest)
        else:
            train_all(options, rest)
    except (ValueError, FileExistsError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        # Later, a stop request would have been obeyed between two steps.
        print("stopped before the first step", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def split_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Separates what chooses a run from the settings of `Config`, which tyro parses.

    >>> options, rest = split_arguments(["--optimizer", "muon", "--seed", "1"])
    >>> options.preset, options.optimizer, rest
    ('cpu', 'muon', ['--seed', '1'])
    """
    return _parser().parse_known_args(arguments)


def process_flags(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says about this process; see `nanogpt.distributed`."""
    names = ("coordinator_address", "num_processes", "process_id")
    return {name: getattr(options, name) for name in names}


def read_config(options: argparse.Namespace, optimizer: str, name: str, rest: list[str]) -> Config:
    """Returns the preset with the settings of the command line in it.

    Args:
        options: from `split_arguments`.
        optimizer: which of the preset's recipes.
        name: of the run, unless the settings name it.
        rest: settings, as in ["--schedule.steps", "100"].
    """
    default = dataclasses.replace(preset(options.preset, optimizer), name=name)
    return tyro.cli(
        tyro.conf.AvoidSubcommands[Config],
        prog=PROGRAM,
        description=f"{__doc__}\n{_parser().format_help()}",
        default=default,
        args=rest,
    )


def train(options: argparse.Namespace, rest: list[str]) -> None:
    """Trains one optimizer in this process; a stop request ends it with 128 + signal."""
    config = read_config(options, options.optimizer, f"{options.preset}/{options.optimizer}", rest)
    # These import jax, which must see the environment that `main` sets.
    from nanogpt import distributed
    from nanogpt.interrupt import Interrupted
    from nanogpt.loop import fit

    first = distributed.start(**process_flags(options), detect=options.distributed) == 0
    with distributed.failing_for_all():
        try:
            with distributed.agreed("preparing the data"):
                if first:
                    prepare_data(config)
                    warn_without_accelerator(options.preset)
            fit(config, resume=options.resume, overwrite=options.overwrite)
        except Interrupted as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(128 + stopped.signum)
        except distributed.JobFailedError as failed:
            sys.exit(f"error: {failed}")


def train_all(options: argparse.Namespace, rest: list[str]) -> None:
    """Trains the optimizers of `DEMO`, each in a process, so that each has its own peak memory."""
    from nanogpt.distributed import join_arguments

    flags = process_flags(options)
    if join_arguments(os.environ, flags, detect=options.distributed) is not None:
        raise ValueError("several processes train one optimizer at a time: name it by --optimizer.")
    group = read_config(options, DEMO[0], options.preset, rest)
    configs = {
        optimizer: read_config(
            options, optimizer, optimizer, [*rest, "--name", f"{group.name}/{optimizer}"]
        )
        for optimizer in DEMO
    }
    folders = {optimizer: RunFolder(config) for optimizer, config in configs.items()}
    if options.resume and not any(folder.holds_run() for folder in folders.values()):
        folders[DEMO[0]].check(resume=True, overwrite=options.overwrite)
    for folder in folders.values():
        folder.check(resume=options.resume and folder.holds_run(), overwrite=options.overwrite)
    prepare_data(group)
    before = folders[DEMO[0]].changed()
    for optimizer, folder in folders.items():
        flags = ["--resume"] * (options.resume and folder.holds_run())
        flags += ["--overwrite"] * options.overwrite
        chosen = ["--preset", options.preset, "--optimizer", optimizer, *flags]
        try:
            run([*chosen, *rest, "--name", configs[optimizer].name])
        finally:
            # Whatever becomes of it, the first new run ends the old group: a later --resume must
            # not take the old group's other runs for its own.
            if options.overwrite and optimizer == DEMO[0] and folder.changed() != before:
                for other in DEMO[1:]:
                    folders[other].clear()
    out = RunFolder(group).path
    picture = compare([folder.path for folder in folders.values()], out)
    print((out / "comparison.md").read_text(encoding="utf-8"))
    print(f"picture: {picture}")


def prepare_data(config: Config) -> None:
    """Brings the demo's own folder up to date: nothing is done where its manifest fits the run."""
    directory = config.data.directory
    if directory != preset("cpu", DEMO[0]).data.directory:
        return
    if not os.path.exists(os.path.join(directory, FILE_NAME)):
        print(f"preparing text in {directory}", flush=True)
    tokenizer = gpt2(min(config.model.vocab_size, GPT2_VOCAB_SIZE))
    prepare(sotu(), directory, tokenizer, val_tokens=config.data.val_tokens)


def warn_without_accelerator(name: str) -> None:
    """Says so if a preset that is made for an accelerator is about to run on the CPU."""
    import jax

    if name == "track3" and jax.default_backend() == "cpu":
        print(
            "warning: jax sees only a CPU, on which preset track3 takes weeks; for an NVIDIA GPU "
            "run `make venv EXTRAS=cuda12` first",
            file=sys.stderr,
        )


def run(arguments: Sequence[str]) -> None:
    """Runs this script in another process; ends this one if that one fails or is stopped."""
    command = [sys.executable, "-m", "scripts.speedrun", *arguments]
    with forwarded_signals() as forward:
        # In a process group of its own, the child gets a Ctrl-C once, from us, and not twice.
        forward.child = subprocess.Popen(command, process_group=0)
        code = forward.child.wait()
    if forward.signum is not None:
        sys.exit(128 + forward.signum)
    if code:
        sys.exit(code if code > 0 else 128 - code)


class Forward:
    """Passes signals on to a child process, and remembers the last one."""

    def __init__(self) -> None:
        self.child: subprocess.Popen | None = None
        self.signum: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler."""
        self.signum = signum
        if self.child is not None:
            self.child.send_signal(signum)


@contextlib.contextmanager
def forwarded_signals() -> Iterator[Forward]:
    """Gives SIGINT and SIGTERM to a child process while the block runs."""
    forward = Forward()
    previous = {
        signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield forward
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


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


if __name__ == "__main__":
    main()
