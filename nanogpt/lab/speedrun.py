"""Trains one optimizer, from one or several seeds, or those of the demo one after another."""

import dataclasses
import math
import os
import sys
from collections.abc import Sequence

from nanogpt.config.presets import PRESETS, is_own, published
from nanogpt.config.run import Config, check_folders
from nanogpt.lab import compile_cache, run_file
from nanogpt.lab.command import command
from nanogpt.lab.command_line import DEMO, Choice, all_words, read_config, split_arguments
from nanogpt.lab.processes import in_processes
from nanogpt.report.comparable import TARGETS, TRACKS, common_track
from nanogpt.report.verdicts import summary, verdict_line
from nanogpt.train.interrupt import Interrupted, StopSignal
from nanogpt.train.metrics import read_records
from nanogpt.train.run_folder import RunFolder

# Later than this, a stop request is obeyed between two steps.
EARLY = "stopped before the first step"
Job = tuple[Choice, Config]  # a run and how it is started


@command(stopped=EARLY)
def main(words: Sequence[str]) -> None:
    """Runs the command line: the one optimizer that it names, or the three of the demo."""
    choice, rest = split_arguments(words)
    if choice.optimizer and not any(word.startswith("--optimizer") for word in words):
        raise ValueError(
            f"--config {choice.config}: names the optimizer {choice.optimizer}, which `nanogpt "
            "train` trains; for the demo leave optimizer and matrices out of the file."
        )
    compile_cache.prepare()
    if choice.optimizer is None:
        train_all(choice, rest)
    else:
        train_named(choice, choice.optimizer, rest)


@command(stopped=EARLY)
def train_command(words: Sequence[str]) -> None:
    """Runs the command line of one optimizer."""
    choice, rest = split_arguments(words)
    compile_cache.prepare()
    if choice.optimizer is None and {"-h", "--help"} & set(rest):
        read_config(choice, DEMO[0], choice.preset, rest)
    if choice.optimizer is None:
        raise ValueError(
            f"--optimizer is missing: choose one of {', '.join(PRESETS[choice.preset])}. "
            "`nanogpt demo` trains three and draws them together."
        )
    train_named(choice, choice.optimizer, rest)


def train_named(choice: Choice, optimizer: str, rest: list[str]) -> None:
    """Trains one optimizer, from one or several seeds, or prints its settings."""
    config = read_config(choice, optimizer, f"{choice.preset}/{optimizer}", rest)
    if choice.print_config:
        print(run_file.text(choice.preset, optimizer, config), end="")
    elif choice.seeds is not None:
        train_seeds(choice, config)
    else:
        train((choice, config))


def train(job: Job) -> None:
    """Trains one run in this process; a stop request ends it with 128 + signal."""
    choice, config = job
    # These import jax, which must see the environment that the command sets.
    from nanogpt.lab.preset_data import prepare_data
    from nanogpt.train import distributed
    from nanogpt.train.loop import fit
    from nanogpt.train.nonfinite import EXIT_CODE, DivergedError

    first = distributed.start(choice.process, detect=choice.distributed) == 0
    with distributed.failing_for_all():
        try:
            with distributed.agreed("preparing the data"):
                if first:
                    prepare_data(config)
                    warn_without_accelerator(choice.preset)
            fit(config, resume=choice.how_resumed, overwrite=choice.overwrite)
        except Interrupted as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(128 + stopped.signum)
        except DivergedError as diverged:
            print(f"error: {diverged}", file=sys.stderr)
            sys.exit(EXIT_CODE)
        except distributed.JobFailedError as failed:
            sys.exit(f"error: {failed}")
    if first and choice.seeds is None:
        print(results(choice, [config]))


def train_all(choice: Choice, rest: list[str]) -> None:
    """Trains the optimizers of `DEMO`, each in a process, so that each has its own peak memory."""
    words = [word for word in all_words(choice, DEMO[0], rest) if word.startswith("--matrices.")]
    words += [f"--{n.replace('_', '-')}" for n in ("seeds", "print_config") if getattr(choice, n)]
    if words:
        raise ValueError(f"{words[0]} is about one optimizer: name it by --optimizer.")
    group = read_config(choice, DEMO[0], choice.preset, rest)
    from nanogpt.report.comparison import compare
    from nanogpt.train.distributed import join_arguments

    if join_arguments(os.environ, choice.process, detect=choice.distributed) is not None:
        raise ValueError("several processes train one optimizer at a time: name it by --optimizer.")
    check_folders(**{"output.directory": group.output.directory})  # of the picture
    jobs = []
    for name in DEMO:
        config = read_config(choice, name, name, [*rest, "--name", f"{group.name}/{name}"])
        jobs.append((dataclasses.replace(choice, optimizer=name), config))
    train_group(jobs)
    out = RunFolder(group).path
    picture = compare([RunFolder(config).path for _, config in jobs], out)
    print((out / "comparison.md").read_text(encoding="utf-8"))
    print(f"picture: {picture}")


def train_seeds(choice: Choice, group: Config) -> None:
    """Trains one optimizer from several initializations, on the same batches in the same order."""
    if choice.seeds is None or choice.seeds < 1:
        raise ValueError(f"seeds={choice.seeds}: must be at least 1.")
    if group.seed:
        raise ValueError(f"seed={group.seed}: --seeds sets the seeds 0, 1, ...: leave --seed out.")
    configs = [
        dataclasses.replace(group, name=f"{group.name}/seed-{seed}", seed=seed)
        for seed in range(choice.seeds)
    ]
    train_group([(choice, config) for config in configs])
    print(results(choice, configs))


def train_group(jobs: Sequence[Job]) -> None:
    """Trains several runs, each in a process; refuses before the first where one would be lost.

    Those of an optimizer of one's own are trained in this process: another would not know it.

    What is resumed is decided here, too. So every one of several processes of a job decides alike:
    none gets past the start of its first run before all of them are there.
    """
    choice, folders = jobs[0][0], [RunFolder(config) for _, config in jobs]
    going_on = [choice.resume and folder.holds_run() for folder in folders]
    if choice.resume and not any(going_on):
        folders[0].check(resume=True, overwrite=choice.overwrite)
    for folder, resume in zip(folders, going_on, strict=True):
        folder.check(resume=resume, overwrite=choice.overwrite)
    before = folders[0].changed()
    for job, resume in zip(jobs, going_on, strict=True):
        started, config = job
        try:
            good = resume and started.previous_good
            job = dataclasses.replace(started, resume=resume, previous_good=good), config
            train(job) if is_own(config.optimizer) else run(job)
        finally:
            # Whatever becomes of it, the first new run ends the old group: a later --resume must
            # not take the old group's other runs for its own.
            first = config is jobs[0][1]
            if choice.overwrite and first and folders[0].changed() != before:
                for other in folders[1:]:
                    other.clear()


def run(job: Job) -> None:
    """Trains a run in another process; ends this one if that one fails or is stopped."""
    try:
        list(in_processes(train, [job], jobs=1))
    except StopSignal as stopped:  # that process has said how to go on
        sys.exit(stopped.code)


def results(choice: Choice, configs: Sequence[Config]) -> str:
    """Final losses of finished runs, one line each, and what the acceptance rule says of them.

    Args:
        choice: `target` is the loss of the rule; without one, that of the track whose rules the
            runs keep, if they keep any.
        configs: all runs of one setting.
    """
    lines, losses, starts = [], [], {}
    for folder, config in ((RunFolder(config), config) for config in configs):
        records = read_records(folder.first_metrics)
        loss, starts[config.name] = records[-1]["loss"], records[0]
        losses.append(math.nan if loss is None else loss)
        lines.append(f"{config.name}: final loss {losses[-1]:.5f}, log {folder.record}")
    track = common_track([], starts)
    target = choice.target or (TARGETS[track] if track else None)
    known = published(choice.preset, choice.optimizer or "")
    if known and known.same_model and known.expected_loss:
        lines.append(
            f"published: {known.expected_loss:.5f} after {known.expected_steps} steps, "
            f"n={known.expected_runs} ({known.source})"
        )
    if target is not None:
        lines.append(verdict_line(losses, target))
    elif len(losses) > 1:
        _, mean, std, n = summary(losses, 0)
        lines.append(f"mean {mean:.5f}, std {std:.5f}, n={n}; --target sets what to prove")
    return "\n".join(lines)


def warn_without_accelerator(name: str) -> None:
    """Says so if a preset that is made for an accelerator is about to run on the CPU."""
    import jax

    if name in TRACKS.values() and jax.default_backend() == "cpu":
        print(
            f"warning: jax sees only a CPU, on which preset {name} takes weeks; for an NVIDIA GPU "
            "run `make venv EXTRAS=cuda12` first",
            file=sys.stderr,
        )
