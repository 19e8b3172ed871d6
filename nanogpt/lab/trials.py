"""Runs that differ in a few settings, and one JSONL file of what came out of them."""

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import rich.console

from nanogpt.config.run import Config
from nanogpt.lab.processes import in_processes
from nanogpt.report.curves import recorded_curve
from nanogpt.report.runs import Run, read_run
from nanogpt.train.batches import open_data
from nanogpt.train.checkpoint import plain
from nanogpt.train.compatible import FREE_SETTINGS
from nanogpt.train.loop import fit
from nanogpt.train.metrics import MetricsWriter, Record, read_records
from nanogpt.train.nonfinite import DivergedError
from nanogpt.train.run_folder import RunFolder

COLUMNS = ("steps", "losses", "seconds")  # of a run's curve


class Trial(NamedTuple):
    """A run of a search.

    Attributes:
        settings: what tells it from the others, by dotted name.
        config: the run; `config.name` is its own folder.
    """

    settings: dict[str, Any]
    config: Config


def run_trials(
    trials: Sequence[Trial],
    path: pathlib.Path,
    *,
    jobs: int = 1,
    run: Callable[[Trial], Record] | None = None,
) -> list[Record]:
    """Trains what the file does not hold yet, and appends a record a trial.

    A trial is known by all of its settings and its data, not by its name. One that was stopped goes
    on from its checkpoint, if it left one, else it starts again. A run whose loss is not finite at
    the end, or above that of its first validation, is recorded as "diverged". Checkpoints of
    finished trials are deleted; their metrics stay. While another process trains for the same file,
    this one waits.

    Args:
        trials: the runs; equal ones are trained once.
        path: JSONL file; created with its folder if missing.
        jobs: processes side by side, with an equal share of the cores each; 1: this process.
        run: trains one trial and returns its record; `run_trial` if None.

    Returns:
        The records, in the order of the trials: "status" "finished" or "diverged", final "loss"
        (None if not finite), "seed", "settings", "step_time_s" (median), "step_times_s" (means
        between records of the training loss), the run's "start" and "end" records, and "steps",
        "losses", "seconds" of its validations.

    Raises:
        ShardError: bad or too few data, before anything is trained.
        Interrupted: a signal stopped the trial in this process.
        RuntimeError: trials failed, after all others were trained; or a process died.
    """
    identities = _identities(trials)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        known = {record["identity"]: record for record in read_trials(path)}
        missing = {
            identity: trial
            for identity, trial in zip(identities, trials, strict=True)
            if identity not in known
        }
        with contextlib.closing(MetricsWriter(path)) as writer:
            done = _train(
                list(missing.values()), jobs, functools.partial(_run_or_tell, run or run_trial)
            )
            for count, (index, record) in enumerate(done, start=1):
                identity = list(missing)[index]
                if record is None:
                    continue
                writer.write("trial", identity=identity, **record)
                known[identity] = record
                print(f"trial {count} of {len(missing)}, {record['name']}: {describe(record)}")
    failed = [trial.config.name for identity, trial in missing.items() if identity not in known]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(missing)} trials failed, see above: {', '.join(failed)}. The "
            "others are kept; the same command tries these again."
        )
    # One run can be two trials, as of a default and of the same number on an axis.
    return [
        known[identity] | {"settings": trial.settings}
        for identity, trial in zip(identities, trials, strict=True)
    ]


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from the same trials: they would train them in the same folders."""
    with open(f"{path}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that writes {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_trials(path: pathlib.Path) -> list[Record]:
    """Returns the records of a file of trials, none if there is no file.

    A line that a crash cut short is taken out of the file, so that the next one starts afresh.
    """
    if not path.exists():
        return []
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return read_records(path)


def describe(record: Record) -> str:
    """Returns a trial's outcome in a few words."""
    loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
    return f"loss {loss}" + (", diverged" if record["status"] == "diverged" else "")


def run_trial(trial: Trial) -> Record:
    """Trains one trial in this process and returns its record; see `run_trials`."""
    folder = RunFolder(trial.config)
    with contextlib.suppress(DivergedError):  # what came of it is in its metrics
        _fit(trial.config, folder)
    shutil.rmtree(folder.checkpoints)
    jax.clear_caches()  # programs of this trial, which no other one uses
    run = read_run(folder.path)
    return {
        "name": trial.config.name,
        "settings": trial.settings,
        "seed": trial.config.seed,
        "status": run.status,
        "loss": _finite(run.curve.losses[-1]),
        "step_time_s": run.end.get("median_step_time_s"),
        "step_times_s": [
            r["step_time_s"] for r in read_records(folder.metrics) if r.get("kind") == "train"
        ],
        "start": run.start,
        "end": run.end,
        **{name: [_finite(value) for value in getattr(run.curve, name)] for name in COLUMNS},
    }


def _fit(config: Config, folder: RunFolder) -> None:
    """Goes on with a run that was stopped, or trains anew where it had other settings or data."""
    console = rich.console.Console(quiet=True)
    if folder.checkpoints.exists() and any(folder.checkpoints.iterdir()):
        with contextlib.suppress(ValueError, FileNotFoundError):
            fit(config, resume=True, console=console)
            return
    fit(config, overwrite=True, console=console)


def as_run(record: Record, label: str) -> Run:
    """Returns a trial's record as the run that it was."""
    curve = recorded_curve(label, *(record[name] for name in COLUMNS))
    return Run(record["name"], record["start"], record["end"], curve)


def _train(
    trials: list[Trial], jobs: int, run: Callable[[Trial], Record | None]
) -> Iterator[tuple[int, Record | None]]:
    if jobs == 1:
        return ((index, run(trial)) for index, trial in enumerate(trials))
    return in_processes(run, trials, jobs)


def _run_or_tell(run: Callable[[Trial], Record], trial: Trial) -> Record | None:
    """The trial's record; None if its settings or their size fail: the others need not.

    `run_trials` raises when all others are done.
    """
    try:
        return run(trial)
    except (RuntimeError, ValueError, MemoryError):  # XLA's errors are RuntimeErrors
        print(f"{trial.config.name} failed:", file=sys.stderr)
        traceback.print_exc()
        return None


def _identities(trials: Sequence[Trial]) -> list[str]:
    """Digests of all that decides each trial's numbers: settings and data.

    What is off does not count, so that trials outlive a new setting that is off where they are.
    """
    fingerprints: dict[Any, str] = {}
    found = []
    for _, config in trials:
        reads = config.data, config.model.sequence_length, config.schedule.steps
        if reads not in fingerprints:
            data = open_data(config)
            data.training.close()
            fingerprints[reads] = data.fingerprint
        settings = plain(config)
        for name in FREE_SETTINGS:
            section, _, field = name.rpartition(".")
            (settings[section] if section else settings).pop(field)
        text = json.dumps([fingerprints[reads], _switched_on(settings)], sort_keys=True)
        found.append(hashlib.sha256(text.encode()).hexdigest())
    return found


def _switched_on(settings: Any) -> Any:
    """Settings without those that are None or False, in all sections.

    >>> _switched_on({"seed": 0, "tail": None, "matrices": {"hyperball": False, "b1": 0.9}})
    {'seed': 0, 'matrices': {'b1': 0.9}}
    """
    if not isinstance(settings, dict):
        return settings
    return {k: _switched_on(v) for k, v in settings.items() if v is not None and v is not False}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
