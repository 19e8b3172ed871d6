"""Runs side by side: comparison.md and comparison.png from their metrics files.

Reads finished or unfinished runs and published curves; imports no jax, so that drawing is quick.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from nanogpt.report.board import board_figure
from nanogpt.report.comparable import check_comparable, common_track, same_clock
from nanogpt.report.curves import Curve, published_file, read_reference, steps_to_reach
from nanogpt.report.figures import BAND, STEPS_NOTE, comparison_figure
from nanogpt.report.groups import Group, pooled
from nanogpt.report.plotting import save
from nanogpt.report.runs import Run, labels, read_run, subject
from nanogpt.report.tables import shown, table
from nanogpt.train.paths import Path, path_of
from nanogpt.train.stored import expecting_form

LONGEST_HEAD = 32  # letters of names in the first line of a picture
MOST = 8  # curves that one panel can show; more are a board
TARGET, TARGET_NAME = "adamw", "AdamW's final loss"


def compare(
    run_dirs: Sequence[Path | str],
    out_dir: Path | str,
    references: Sequence[pathlib.Path | str] = (),
    *,
    unchecked: bool = False,
    target: float | None = None,
) -> pathlib.Path:
    """Writes comparison.png, comparison-dark.png for dark pages, and comparison.md.

    Args:
        run_dirs: folders that hold a metrics.jsonl.
        out_dir: where the files go; created if missing.
        references: CSV files of published curves, see `nanogpt.report.curves`.
        unchecked: draw runs without a fingerprint, too; the picture says which.
        target: loss to reach; None: the final one of AdamW, if it is among the runs.

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
    starts = {run.folder: run.start for run in runs}
    unknown = check_comparable(starts, unchecked=unchecked)
    common_track([pathlib.Path(path).name for path in references], starts)
    curves = [read_reference(published_file(pathlib.Path(path))) for path in references]
    names = ", ".join(run.curve.label for run in named(runs) if run.folder in unknown)
    note = f"not checked to be comparable: {names}" if names else ""
    picture = out / "comparison.png"
    save(picture, lambda: figure_of(runs, references=curves, note=note, target=target))
    (out / "comparison.md").write_text(report(named(runs), target), encoding="utf-8")
    return picture


def figure_of(
    runs: Sequence[Run],
    *,
    references: Sequence[Curve] = (),
    note: str = "",
    target: float | None = None,
) -> Figure:
    """Draws runs, those of one setting as one curve; many settings as a board.

    Args:
        runs: see `read_runs`.
        references: published curves.
        note: a line below the picture.
        target: as of `compare`.
    """
    groups, timed = pooled(runs), same_clock([run.start for run in runs])
    names = ", ".join(group.label for group in groups)
    names = names if len(names) <= LONGEST_HEAD else f"{len(groups)} settings"
    head, lines = f"Validation loss of {names}", subject([run.start for run in runs])
    name, goal = ("the target", target) if target else (TARGET_NAME, reference_loss(groups))
    if len(groups) > MOST:
        base = next((g.label for g in groups if g.start["config"]["optimizer"] == TARGET), "")
        groups = [dataclasses.replace(group, timed=timed) for group in groups]
        groups += [Group(c.label, [c], timed=False, reference=True) for c in references]
        heading = (head, f"{lines}\n{note}" if note else lines)
        return board_figure(groups, target=goal, baseline=base, heading=heading)
    if any(len(group.runs) > 1 for group in groups):
        lines += f"\n{BAND}\n{STEPS_NOTE}"
    return comparison_figure(
        groups, references=references, levels=baselines(runs), heading=(head, lines), note=note,
        target=None if goal is None else (name, goal), timed=timed,
    )  # fmt: skip


def reference_loss(groups: Sequence[Group]) -> float | None:
    """Final loss of AdamW, the lowest of several; None where none has one that is finite."""
    ends = [g.shown.losses[-1] for g in groups if g.start["config"]["optimizer"] == TARGET]
    return min(filter(math.isfinite, ends), default=None)


def read_runs(folders: Sequence[Path | str]) -> list[Run]:
    """Reads runs that hold all that the table tells; errors as of `read_run`."""
    runs = [read_run(path_of(os.fspath(folder))) for folder in folders]
    for run in runs:
        with expecting_form(path_of(run.folder) / "metrics.jsonl", ValueError):
            report([run])
    return runs


def named(runs: Sequence[Run]) -> list[Run]:
    """The runs, each by a name of its own."""
    pairs = zip(runs, labels(runs), strict=True)
    return [run._replace(curve=run.curve._replace(label=label)) for run, label in pairs]


def baselines(runs: Sequence[Run]) -> dict[str, float]:
    """Returns {name: nats per token} of the n-gram models on the validation text of the runs.

    Empty when the runs do not agree on them: a line would be wrong for some.
    """
    found = [run.start["baselines"] for run in runs]
    agreed = [name for name in ("unigram", "bigram") if len({f.get(name) for f in found}) == 1]
    return {name: found[0][name] for name in agreed if name in found[0]}


def columns(runs: Sequence[Run], target: float | None = None) -> dict[str, Callable[[Run], str]]:
    """The table of runs, {title: function from a run to its cell}."""
    reach = TARGET_NAME if target is None else f"{target:g}"
    goal = reference_loss(pooled(runs)) if target is None else target
    timed = same_clock([run.start for run in runs])
    return {
        "optimizer": lambda run: run.curve.label,
        "steps": _steps,
        "final loss (nats/token)": lambda run: (
            "diverged" if run.status == "diverged" else f"{run.curve.losses[-1]:.4f}"
        ),
        "bits/byte": lambda run: shown(run.end.get("bits_per_byte"), ".4f"),
        f"steps to {reach}": lambda run: shown(_reached(run, goal), ".0f"),
        "training time (s)": lambda run: shown(run.curve.seconds[-1] if timed else None, ".1f"),
        "step time (ms, median)": _end("median_step_time_s", ".1f", 1e3, shows=timed),
        "tokens/s": _end("tokens_per_s", ",.0f", shows=timed),
        "peak memory (MB)": _end("peak_memory_bytes", ",.0f", 1e-6),
        "optimizer state (MB)": lambda run: shown(run.start["optimizer_state_bytes"], ",.1f", 1e-6),
        "compile (s)": _end("compile_s", ".1f", shows=timed),
    }


def report(runs: Sequence[Run], target: float | None = None) -> str:
    """Returns the text of comparison.md."""
    parts = [
        "# Comparison of optimizers",
        table(columns(runs, target), runs),
        "![validation loss](comparison.png)",
        *notes(runs),
    ]
    return "\n\n".join(parts) + "\n"


def notes(runs: Sequence[Run]) -> list[str]:
    """What stands below the table: times left out, n-gram models, machines."""
    parts = []
    if not same_clock([run.start for run in runs]):
        parts.append("The runs are from different hosts or devices, so their times are left out.")
    lines = [f"{name} {loss:.4f}" for name, loss in baselines(runs).items()]
    if lines:
        parts.append(
            "n-gram models on the same validation text, nats/token: "
            f"{', '.join(lines)}. (The bigram is interpolated: .7 bigram, .3 unigram.)"
        )
    return parts + _machines(runs)


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
    texts: dict[str, list[str]] = {}
    for run in runs:
        device, versions = run.start["device"], run.start["versions"]
        commit = (run.start["git_commit"] or "unknown")[:12]
        dirty = " with local changes" if run.start["git_dirty"] else ""
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        text = (
            f"Machine: {device['kind']} ({device['platform']}, devices: {device['count']}). "
            f"Commit {commit}{dirty}. Versions: {listed}. "
            f"Parameters: {run.start['parameters']:,}."
        )
        texts.setdefault(text, []).append(str(run.start["config"]["seed"]))
    seeds = {text: list(dict.fromkeys(found)) for text, found in texts.items()}
    return [f"{text} Seed{'s' * (len(of) > 1)}: {', '.join(of)}." for text, of in seeds.items()]
