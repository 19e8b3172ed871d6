"""Runs side by side: comparison.md and comparison.png from their metrics files.

Reads finished or unfinished runs and published curves; imports no jax, so that drawing is quick.
"""

import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nanogpt.report.comparable import check_comparable, common_track, departure, same_clock
from nanogpt.report.curves import (
    Curve,
    published_file,
    read_reference,
    recorded_curve,
    steps_to_reach,
)
from nanogpt.report.plotting import draw
from nanogpt.report.tables import shown, table
from nanogpt.train.metrics import read_records
from nanogpt.train.paths import Path, path_of
from nanogpt.train.stored import expecting_form

# Names of the field; a run of an unlisted optimizer is called by its registry name.
TITLES = {"adamw": "AdamW", "muon": "Muon", "muon_track3": "Muon (track 3)", "shampoo": "Shampoo"}
TARGET = "adamw"
COLUMNS = ("step", "loss", "train_time_s")  # of a validation's record


class Run(NamedTuple):
    """A run as its metrics file tells it.

    Attributes:
        folder: where it lies.
        start: first record: config, versions, device, sizes, baselines.
        end: last record if the run has ended, by itself or because it diverged; else empty.
        curve: its validations, called by the optimizer; nan where a loss was not finite, and in the
            place of the last one of a run that ended before it because it diverged.
    """

    folder: str
    start: dict[str, Any]
    end: dict[str, Any]
    curve: Curve

    @property
    def optimizer(self) -> str:
        """Registry name of the optimizer of the block matrices."""
        return self.start["config"]["optimizer"]

    @property
    def status(self) -> str:
        """One of "finished", "unfinished", and "diverged": ended no better than it began."""
        if not self.end:
            return "unfinished"
        return "finished" if self.curve.losses[-1] <= self.curve.losses[0] else "diverged"


def compare(
    run_dirs: Sequence[Path | str],
    out_dir: Path | str,
    references: Sequence[pathlib.Path | str] = (),
    *,
    unchecked: bool = False,
) -> pathlib.Path:
    """Writes comparison.png and comparison.md.

    Args:
        run_dirs: folders that hold a metrics.jsonl.
        out_dir: where both files go; created if missing.
        references: CSV files of published curves, see `nanogpt.report.curves`.
        unchecked: draw runs without a fingerprint, too; the picture says which.

    Returns:
        Path of the picture.

    Raises:
        FileNotFoundError: a folder without metrics.jsonl.
        ValueError: no folder is given, a metrics file holds no validation, a CSV file lacks a
            column, or runs cannot be compared, see `nanogpt.report.comparable`.
    """
    if not run_dirs:
        raise ValueError("no runs to compare: name at least one folder of a run.")
    out = pathlib.Path(out_dir)
    runs = read_runs(run_dirs)
    lines = [run.curve._replace(label=label) for run, label in zip(runs, labels(runs), strict=True)]
    runs = [run._replace(curve=curve) for run, curve in zip(runs, lines, strict=True)]
    starts = {run.folder: run.start for run in runs}
    unknown = check_comparable(starts, unchecked=unchecked)
    common_track([pathlib.Path(path).name for path in references], starts)
    curves = [read_reference(published_file(pathlib.Path(path))) for path in references]
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "comparison.png"
    names = [run.curve.label for run in runs if run.folder in unknown]
    note = f"not checked to be comparable: {', '.join(names)}" if names else ""
    timed = same_clock([run.start for run in runs])
    draw(picture, lines, curves, baselines(runs), note=note, timed=timed)
    (out / "comparison.md").write_text(report(runs), encoding="utf-8")
    return picture


def read_runs(folders: Sequence[Path | str]) -> list[Run]:
    """Reads runs that hold all that the table tells; errors as of `read_run`."""
    runs = [read_run(path_of(os.fspath(folder))) for folder in folders]
    for run in runs:
        with expecting_form(path_of(run.folder) / "metrics.jsonl", ValueError):
            report([run])
    return runs


def read_run(folder: Path) -> Run:
    """Reads folder/metrics.jsonl.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not begin with a "start" record, holds no validation, or one without
            its figures.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {folder} is not the folder of a run.")
    records = read_records(path)
    validations = [record for record in records if record.get("kind") == "val"]
    if not validations or records[0].get("kind") != "start":
        raise ValueError(f"{path} holds no validation yet: train the run first.")
    start, last = records[0], records[-1]
    with expecting_form(path, ValueError):
        if last.get("kind") == "diverged":
            end = {"step": start["config"]["schedule"]["steps"], "loss": None}
            validations.append(end | {"train_time_s": math.nan})
        columns = [[record[name] for record in validations] for name in COLUMNS]
        optimizer = start["config"]["optimizer"]
        curve = recorded_curve(TITLES.get(optimizer, optimizer), *columns)
        departure(start)
        check_comparable({str(folder): start}, unchecked=True)
    return Run(str(folder), start, last if last.get("kind") in ("end", "diverged") else {}, curve)


def baselines(runs: Sequence[Run]) -> dict[str, float]:
    """Returns {name: nats per token} of the n-gram models on the validation text of the runs.

    Empty when the runs do not agree on them: a line would be wrong for some.
    """
    found = [run.start["baselines"] for run in runs]
    agreed = [name for name in ("unigram", "bigram") if len({f.get(name) for f in found}) == 1]
    return {name: found[0][name] for name in agreed if name in found[0]}


def report(runs: Sequence[Run]) -> str:
    """Returns the text of comparison.md."""
    # Nothing reaches a loss that is not finite.
    last = [run.curve.losses[-1] for run in runs if run.optimizer == TARGET]
    target = min(filter(math.isfinite, last), default=None)
    timed = same_clock([run.start for run in runs])
    columns: dict[str, Callable[[Run], str]] = {
        "optimizer": lambda run: run.curve.label,
        "steps": _steps,
        "final loss (nats/token)": lambda run: (
            "diverged" if run.status == "diverged" else f"{run.curve.losses[-1]:.4f}"
        ),
        "bits/byte": lambda run: shown(run.end.get("bits_per_byte"), ".4f"),
        "steps to AdamW's final loss": lambda run: shown(_reached(run, target), ".0f"),
        "training time (s)": lambda run: shown(run.curve.seconds[-1] if timed else None, ".1f"),
        "step time (ms, median)": _end("median_step_time_s", ".1f", 1e3, shows=timed),
        "tokens/s": _end("tokens_per_s", ",.0f", shows=timed),
        "peak memory (MB)": _end("peak_memory_bytes", ",.0f", 1e-6),
        "optimizer state (MB)": lambda run: shown(run.start["optimizer_state_bytes"], ",.1f", 1e-6),
        "compile (s)": _end("compile_s", ".1f", shows=timed),
    }
    parts = [
        "# Comparison of optimizers",
        table(columns, runs),
        "![validation loss](comparison.png)",
    ]
    if not timed:
        parts.append("The runs are from different hosts or devices, so their times are left out.")
    lines = [f"{name} {loss:.4f}" for name, loss in baselines(runs).items()]
    if lines:
        parts.append(
            "n-gram models on the same validation text, nats/token: "
            f"{', '.join(lines)}. (The bigram is interpolated: .7 bigram, .3 unigram.)"
        )
    return "\n\n".join(parts + _machines(runs)) + "\n"


def _end(name: str, form: str, scale: float = 1.0, *, shows: bool = True) -> Callable[[Run], str]:
    """A column of what the last records say."""
    return lambda run: shown(run.end.get(name) if shows else None, form, scale)


def _steps(run: Run) -> str:
    planned = run.start["config"]["schedule"]["steps"]
    done = run.end.get("step", run.curve.steps[-1])
    return str(done) if done == planned else f"{done} of {planned}"


def _reached(run: Run, target: float | None) -> float | None:
    if run.optimizer == TARGET and run.curve.losses[-1] == target:
        return float(run.curve.steps[-1])
    return None if target is None else steps_to_reach(run.curve, target)


def _machines(runs: Sequence[Run]) -> list[str]:
    """One paragraph for each machine and set of versions among the runs."""
    texts = []
    for run in runs:
        device, versions = run.start["device"], run.start["versions"]
        commit = (run.start["git_commit"] or "unknown")[:12]
        dirty = " with local changes" if run.start["git_dirty"] else ""
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        texts.append(
            f"Machine: {device['kind']} ({device['platform']}, devices: {device['count']}). "
            f"Commit {commit}{dirty}. Versions: {listed}. "
            f"Parameters: {run.start['parameters']:,}. Seed: {run.start['config']['seed']}."
        )
    return list(dict.fromkeys(texts))


def labels(runs: Sequence[Run]) -> list[str]:
    """Calls runs by optimizer; several of one optimizer also by name, those of one by folder."""
    choices = [
        [
            f"{run.curve.label} {more}".strip()
            for more in ("", run.start["config"]["name"], run.folder)
        ]
        for run in runs
    ]
    taken = [label for own in choices for label in own]
    return [next((c for c in own if taken.count(c) == 1), own[-1]) for own in choices]
