"""Runs side by side: comparison.md and comparison.png from their metrics files.

Reads finished or unfinished runs and published curves; imports no jax, so that drawing is quick.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from nanogpt.report.comparable import check_comparable, common_track, same_clock
from nanogpt.report.curves import Curve, published_file, read_reference, steps_to_reach
from nanogpt.report.plotting import draw
from nanogpt.report.tables import markdown, shown
from nanogpt.train.metrics import read_records

# Names of the field; a run of an unlisted optimizer is called by its registry name.
TITLES = {"adamw": "AdamW", "muon": "Muon", "muon_track3": "Muon (track 3)", "shampoo": "Shampoo"}
TARGET = "adamw"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its metrics file tells it.

    Attributes:
        label: what the picture calls it.
        start: first record: config, versions, device, sizes, baselines.
        end: last record if the run is finished, else empty.
        steps: updates before each validation.
        losses: validation loss, nats per token; nan where it was not finite.
        seconds: training time at each validation.
    """

    label: str
    start: dict[str, Any]
    end: dict[str, Any]
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def optimizer(self) -> str:
        """Registry name of the optimizer of the block matrices."""
        return self.start["config"]["optimizer"]

    @property
    def curve(self) -> Curve:
        """The validations alone."""
        return Curve(self.label, self.steps, self.losses, self.seconds)


def compare(
    run_dirs: Sequence[pathlib.Path | str],
    out_dir: pathlib.Path | str,
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
    runs = _distinct([read_run(pathlib.Path(folder)) for folder in run_dirs])
    starts = {run.label: run.start for run in runs}
    unknown = check_comparable(starts, unchecked=unchecked)
    configs = {label: start["config"] for label, start in starts.items()}
    common_track([pathlib.Path(path).name for path in references], configs)
    lines = [run.curve for run in runs]
    curves = [read_reference(published_file(pathlib.Path(path))) for path in references]
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "comparison.png"
    note = f"not checked to be comparable: {', '.join(unknown)}" if unknown else ""
    timed = same_clock(list(starts.values()))
    draw(picture, lines, curves, baselines(runs), note=note, timed=timed)
    (out / "comparison.md").write_text(report(runs), encoding="utf-8")
    return picture


def read_run(folder: pathlib.Path) -> Run:
    """Reads folder/metrics.jsonl.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not begin with a "start" record, or holds no validation.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {folder} is not the folder of a run.")
    records = read_records(path)
    validations = [record for record in records if record["kind"] == "val"]
    if not validations or records[0]["kind"] != "start":
        raise ValueError(f"{path} holds no validation yet: train the run first.")
    optimizer = records[0]["config"]["optimizer"]
    return Run(
        label=TITLES.get(optimizer, optimizer),
        start=records[0],
        end=records[-1] if records[-1]["kind"] == "end" else {},
        steps=tuple(record["step"] for record in validations),
        losses=tuple(_number(record["loss"]) for record in validations),
        seconds=tuple(record["train_time_s"] for record in validations),
    )


def baselines(runs: Sequence[Run]) -> dict[str, float]:
    """Returns {label: nats per token} of the n-gram models on the validation text of the runs.

    Empty when the runs do not agree on them: a line would be wrong for some.
    """
    found = [run.start["baselines"] for run in runs]
    names = {"unigram": "unigram", "bigram": "bigram"}
    return {
        title: found[0][name]
        for name, title in names.items()
        if all(name in entry and entry[name] == found[0].get(name) for entry in found)
    }


def report(runs: Sequence[Run]) -> str:
    """Returns the text of comparison.md."""
    # Nothing reaches a loss that is not finite.
    last = [run.losses[-1] for run in runs if run.optimizer == TARGET]
    finals = [loss for loss in last if math.isfinite(loss)]
    target = min(finals) if finals else None
    head = [
        "optimizer", "steps", "final loss (nats/token)", "bits/byte",
        "steps to AdamW's final loss", "training time (s)", "step time (ms, median)", "tokens/s",
        "peak memory (MB)", "optimizer state (MB)", "compile (s)",
    ]  # fmt: skip
    timed = same_clock([run.start for run in runs])
    table = markdown(head, [_row(run, target, timed) for run in runs])
    parts = ["# Comparison of optimizers", table, "![validation loss](comparison.png)"]
    if not timed:
        parts.append("The runs are from different hosts or devices, so their times are left out.")
    lines = [f"{name} {loss:.4f}" for name, loss in baselines(runs).items()]
    if lines:
        parts.append(
            "n-gram models on the same validation text, nats/token: "
            f"{', '.join(lines)}. (The bigram is interpolated: .7 bigram, .3 unigram.)"
        )
    return "\n\n".join(parts + _machines(runs)) + "\n"


def _row(run: Run, target: float | None, timed: bool) -> list[str]:
    end = run.end if timed else {}
    reached = None if target is None else steps_to_reach(run.curve, target)
    if run.optimizer == TARGET and run.losses[-1] == target:
        reached = float(run.steps[-1])
    planned, done = run.start["config"]["schedule"]["steps"], run.steps[-1]
    return [
        run.label,
        str(done) if done == planned else f"{done} of {planned}",
        f"{run.losses[-1]:.4f}",
        shown(run.end.get("bits_per_byte"), ".4f"),
        shown(reached, ".0f"),
        shown(run.seconds[-1] if timed else None, ".1f"),
        shown(end.get("median_step_time_s"), ".1f", 1e3),
        shown(end.get("tokens_per_s"), ",.0f"),
        shown(run.end.get("peak_memory_bytes"), ",.0f", 1e-6),
        shown(run.start["optimizer_state_bytes"], ",.1f", 1e-6),
        shown(end.get("compile_s"), ".1f"),
    ]


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


def _distinct(runs: list[Run]) -> list[Run]:
    """Calls runs of the same optimizer by their folders' names too."""
    labels = [run.label for run in runs]
    return [
        dataclasses.replace(run, label=f"{run.label} {run.start['config']['name']}")
        if labels.count(run.label) > 1
        else run
        for run in runs
    ]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
