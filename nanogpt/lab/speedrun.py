"""Trains one optimizer after another on the same batches and draws the comparison.

Without --optimizer: AdamW, Muon and Shampoo, each in a process of its own. --seeds N trains one
optimizer N times and applies the benchmark's acceptance rule. Every setting below can be changed;
the values shown are those of the preset. `--optimizer shampoo --help` shows that optimizer's own
settings, --matrices.*, in the place of AdamW's.
"""

import argparse
import dataclasses
import errno
import math
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from data_pipeline import fineweb, gpt2, missing, prepare, shards_needed, sotu
from data_pipeline.download import shard_bytes
from data_pipeline.manifest import FILE_NAME
from data_pipeline.tokenizer import GPT2_VOCAB_SIZE
from nanogpt.config.presets import PRESETS, is_own, preset
from nanogpt.config.published import PUBLISHED
from nanogpt.config.run import Config
from nanogpt.lab.children import run_child
from nanogpt.report.comparison import compare
from nanogpt.report.verdicts import verdict_line
from nanogpt.train.metrics import read_records
from nanogpt.train.run_folder import RunFolder

DEMO = ("adamw", "muon", "shampoo")
PROGRAM = "python -m scripts.speedrun"
# Losses that the acceptance rule is about, where a preset has one.
TARGETS = {"track3": 3.28}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    # OpenBLAS spins a thread pool for every decomposition, which is slower on few cores; it reads
    # this when jax is first imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    options, rest = split_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.seeds is not None:
            train_seeds(options, rest)
        elif options.optimizer is not None:
            train(options, rest)
        else:
            train_all(options, rest)
    except (ValueError, FileExistsError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(
            f"error: the disk is full ({error}): make room and repeat the command with --resume; "
            "it goes on from the newest checkpoint."
        )
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
    """What the command line says about this process; see `nanogpt.train.distributed`."""
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
    from nanogpt.train import distributed
    from nanogpt.train.interrupt import Interrupted
    from nanogpt.train.loop import fit

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
    if first and not options.one_of_seeds:
        print(results(options, [config]))


def train_all(options: argparse.Namespace, rest: list[str]) -> None:
    """Trains the optimizers of `DEMO`, each in a process, so that each has its own peak memory."""
    from nanogpt.train.distributed import join_arguments

    told = process_flags(options)
    if join_arguments(os.environ, told, detect=options.distributed) is not None:
        raise ValueError("several processes train one optimizer at a time: name it by --optimizer.")
    group = read_config(options, DEMO[0], options.preset, rest)
    configs = [
        read_config(options, optimizer, optimizer, [*rest, "--name", f"{group.name}/{optimizer}"])
        for optimizer in DEMO
    ]
    train_group(options, rest, DEMO, configs)
    out = RunFolder(group).path
    picture = compare([RunFolder(config).path for config in configs], out)
    print((out / "comparison.md").read_text(encoding="utf-8"))
    print(f"picture: {picture}")


def train_seeds(options: argparse.Namespace, rest: list[str]) -> None:
    """Trains one optimizer from several initializations, on the same batches in the same order."""
    if options.optimizer is None or options.seeds < 1:
        raise ValueError(
            f"seeds={options.seeds}: --seeds takes the number of runs, at least 1, of one "
            "optimizer: name it by --optimizer."
        )
    group = read_config(options, options.optimizer, f"{options.preset}/{options.optimizer}", rest)
    if group.seed:
        raise ValueError(f"seed={group.seed}: --seeds sets the seeds 0, 1, ...: leave --seed out.")
    configs = [
        dataclasses.replace(group, name=f"{group.name}/seed-{seed}", seed=seed)
        for seed in range(options.seeds)
    ]
    train_group(options, rest, [options.optimizer] * options.seeds, configs)
    print(results(options, configs))


def train_group(
    options: argparse.Namespace,
    rest: list[str],
    optimizers: Sequence[str],
    configs: Sequence[Config],
) -> None:
    """Trains several runs, each in a process; refuses before the first where one would be lost.

    Those of an optimizer of one's own are trained in this process: another would not know it.

    What is resumed is decided here, too. So every one of several processes of a job decides alike:
    none gets past the start of its first run before all of them are there.
    """
    folders = [RunFolder(config) for config in configs]
    going_on = [options.resume and folder.holds_run() for folder in folders]
    if options.resume and not any(going_on):
        folders[0].check(resume=True, overwrite=options.overwrite)
    for folder, resume in zip(folders, going_on, strict=True):
        folder.check(resume=resume, overwrite=options.overwrite)
    before = folders[0].changed()
    for optimizer, config, resume in zip(optimizers, configs, going_on, strict=True):
        of_seeds = {"seeds": None, "one_of_seeds": options.seeds is not None}
        chosen = flags(options, optimizer=optimizer, resume=resume, **of_seeds)
        try:
            words = [*chosen, *rest, "--name", config.name, "--seed", str(config.seed)]
            main(words) if is_own(optimizer) else run(words)
        finally:
            # Whatever becomes of it, the first new run ends the old group: a later --resume must
            # not take the old group's other runs for its own.
            first = config is configs[0]
            if options.overwrite and first and folders[0].changed() != before:
                for other in folders[1:]:
                    other.clear()


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


def run(arguments: Sequence[str]) -> None:
    """Runs this script in another process; ends this one if that one fails or is stopped."""
    run_child([sys.executable, "-m", "scripts.speedrun", *arguments])


def results(options: argparse.Namespace, configs: Sequence[Config]) -> str:
    """Final losses of finished runs, one line each, and what the acceptance rule says of them.

    Args:
        options: `target` is the loss of the rule; without one, that of the preset, if it has one.
        configs: all runs of one setting.
    """
    lines, losses = [], []
    for folder, config in ((RunFolder(config), config) for config in configs):
        loss = read_records(folder.first_metrics)[-1]["loss"]
        losses.append(math.nan if loss is None else loss)
        lines.append(f"{config.name}: final loss {losses[-1]:.5f}, log {folder.record}")
    target = options.target or TARGETS.get(options.preset)
    known = PUBLISHED.get(options.optimizer) if options.preset == "track3" else None
    if known and known.same_model and known.expected_loss:
        lines.append(
            f"published: {known.expected_loss:.5f} after {known.expected_steps} steps, "
            f"n={known.expected_runs} ({known.source})"
        )
    if target is not None:
        lines.append(verdict_line(losses, target))
    elif len(losses) > 1:
        mean, std = statistics.fmean(losses), statistics.stdev(losses)
        lines.append(
            f"mean {mean:.5f}, std {std:.5f}, n={len(losses)}; --target sets what to prove"
        )
    return "\n".join(lines)


def prepare_data(config: Config) -> None:
    """Brings a preset's own folder up to date; nothing is done where it fits the run already."""
    directory = config.data.directory
    if directory == preset("track3", DEMO[0]).data.directory:
        download(config)
    elif directory in [preset(name, DEMO[0]).data.directory for name in ("cpu", "board")]:
        if not os.path.exists(os.path.join(directory, FILE_NAME)):
            print(f"preparing text in {directory}", flush=True)
        tokenizer = gpt2(min(config.model.vocab_size, GPT2_VOCAB_SIZE))
        prepare(sotu(), directory, tokenizer, val_tokens=config.data.val_tokens)


def download(config: Config) -> None:
    """Downloads the shards of FineWeb that the run reads and the folder does not hold."""
    batch_tokens = config.data.batch_rows * config.model.sequence_length
    shards = shards_needed(config.schedule.steps, batch_tokens)
    names = missing(config.data.directory, shards)
    if names:
        print(
            f"{config.schedule.steps} steps need {shards} training shards and one for validation: "
            f"downloading {len(names)} of them, {len(names) * shard_bytes() / 1e9:.1f} GB, to "
            f"{config.data.directory}",
            flush=True,
        )
        fineweb(config.data.directory, shards)


def warn_without_accelerator(name: str) -> None:
    """Says so if a preset that is made for an accelerator is about to run on the CPU."""
    import jax

    if name == "track3" and jax.default_backend() == "cpu":
        print(
            "warning: jax sees only a CPU, on which preset track3 takes weeks; for an NVIDIA GPU "
            "run `make venv EXTRAS=cuda12` first",
            file=sys.stderr,
        )


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
