"""Trains one optimizer, from one or several seeds, or those of the demo one after another."""

import argparse
import dataclasses
import errno
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence

from nanogpt.config.presets import PRESETS, PUBLISHED, is_own
from nanogpt.config.run import Config
from nanogpt.lab import compile_cache, run_file
from nanogpt.lab.command import command
from nanogpt.lab.command_line import DEMO, flags, process_flags, read_config, split_arguments
from nanogpt.lab.processes import in_processes
from nanogpt.report.comparable import TARGETS, common_track
from nanogpt.report.verdicts import verdict_line
from nanogpt.train.interrupt import Interrupted, StopSignal
from nanogpt.train.metrics import read_records
from nanogpt.train.run_folder import RunFolder

# Later than this, a stop request is obeyed between two steps.
EARLY = "stopped before the first step"


@command(stopped=EARLY)
def main(arguments: Sequence[str]) -> None:
    """Runs the command line: the one optimizer that it names, or the three of the demo."""
    _run(arguments, train_all)


@command(stopped=EARLY)
def train_command(arguments: Sequence[str]) -> None:
    """Runs the command line of one optimizer."""
    _run(arguments, _refuse_without_optimizer)


def _run(arguments: Sequence[str], otherwise: Callable[..., None]) -> None:
    """Does what the command line says; `otherwise` is for one that names no optimizer."""
    compile_cache.prepare()
    try:
        options, rest = split_arguments(arguments)
        if options.print_config:
            print_config(options, rest)
        elif options.seeds is not None:
            train_seeds(options, rest)
        elif options.optimizer is not None:
            train(options, rest)
        else:
            otherwise(options, rest)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(
            f"error: the disk is full ({error}): make room and repeat the command with --resume; "
            "it goes on from the newest checkpoint."
        )


def _refuse_without_optimizer(options: argparse.Namespace, rest: list[str]) -> None:
    if {"-h", "--help"} & set(rest):
        read_config(options, DEMO[0], options.preset, rest)
    raise ValueError(
        f"--optimizer is missing: choose one of {', '.join(PRESETS[options.preset])}. "
        "`nanogpt demo` trains three and draws them together."
    )


def print_config(options: argparse.Namespace, rest: list[str]) -> None:
    """Prints all settings of a run in YAML, as --config takes them."""
    if options.optimizer is None:
        raise ValueError("--print-config shows one run: name its optimizer by --optimizer.")
    name = f"{options.preset}/{options.optimizer}"
    config = read_config(options, options.optimizer, name, rest)
    print(run_file.text(options.preset, options.optimizer, config), end="")


def train(options: argparse.Namespace, rest: list[str]) -> None:
    """Trains one optimizer in this process; a stop request ends it with 128 + signal."""
    config = read_config(options, options.optimizer, f"{options.preset}/{options.optimizer}", rest)
    # These import jax, which must see the environment that `main` sets.
    from nanogpt.lab.preset_data import prepare_data
    from nanogpt.train import distributed
    from nanogpt.train.loop import fit
    from nanogpt.train.nonfinite import EXIT_CODE, DivergedError

    first = distributed.start(process_flags(options), detect=options.distributed) == 0
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
        except DivergedError as diverged:
            print(f"error: {diverged}", file=sys.stderr)
            sys.exit(EXIT_CODE)
        except distributed.JobFailedError as failed:
            sys.exit(f"error: {failed}")
    if first and not options.one_of_seeds:
        print(results(options, [config]))


def train_all(options: argparse.Namespace, rest: list[str]) -> None:
    """Trains the optimizers of `DEMO`, each in a process, so that each has its own peak memory."""
    for word in rest:
        if word.startswith("--matrices."):
            raise ValueError(
                f"{word}: the settings of matrices are one optimizer's: name it by --optimizer."
            )
    group = read_config(options, DEMO[0], options.preset, rest)
    from nanogpt.report.comparison import compare
    from nanogpt.train.distributed import join_arguments

    told = process_flags(options)
    if join_arguments(os.environ, told, detect=options.distributed) is not None:
        raise ValueError("several processes train one optimizer at a time: name it by --optimizer.")
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


def run(arguments: Sequence[str]) -> None:
    """Runs `nanogpt train` in another process; ends this one if that one fails or is stopped."""
    try:
        list(in_processes(train_command, [arguments], jobs=1))
    except StopSignal as stopped:  # that process has said how to go on
        sys.exit(stopped.code)


def results(options: argparse.Namespace, configs: Sequence[Config]) -> str:
    """Final losses of finished runs, one line each, and what the acceptance rule says of them.

    Args:
        options: `target` is the loss of the rule; without one, that of the track whose rules the
            runs keep, if they keep any.
        configs: all runs of one setting.
    """
    lines, losses = [], []
    for folder, config in ((RunFolder(config), config) for config in configs):
        loss = read_records(folder.first_metrics)[-1]["loss"]
        losses.append(math.nan if loss is None else loss)
        lines.append(f"{config.name}: final loss {losses[-1]:.5f}, log {folder.record}")
    track = common_track([], {config.name: dataclasses.asdict(config) for config in configs})
    target = options.target or (TARGETS[track] if track else None)
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


def warn_without_accelerator(name: str) -> None:
    """Says so if a preset that is made for an accelerator is about to run on the CPU."""
    import jax

    if name == "track3" and jax.default_backend() == "cpu":
        print(
            "warning: jax sees only a CPU, on which preset track3 takes weeks; for an NVIDIA GPU "
            "run `make venv EXTRAS=cuda12` first",
            file=sys.stderr,
        )
