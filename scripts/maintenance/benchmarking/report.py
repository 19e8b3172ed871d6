"""Results of a benchmark as JSON, as a table and as a picture."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from nanogpt.report.plotting import COLOURS, GREY, STYLE
from scripts.maintenance.benchmarking.candidates import MUON, PARTS

COLUMNS = {
    "step (ms)": ("step_s", 1e3),
    "slowest (ms)": ("slowest_s", 1e3),
    **{f"{part} (ms)": (part, 1e3) for part in reversed(PARTS)},
    "x Muon": ("to_muon", 1),
    "x AdamW": ("to_adamw", 1),
    "train step x Muon": ("train_to_muon", 1),
    "of train step (%)": ("share", 100),
    "GFLOP": ("flops", 1e-9),
    "moved (GB)": ("bytes", 1e-9),
    "peak (GB)": ("peak_memory_bytes", 1e-9),
    "state (GB)": ("state_bytes", 1e-9),
    "compile (s)": ("compile_s", 1),
}


def with_ratios(records: Sequence[Mapping[str, Any]], model_s: float | None) -> list[dict]:
    """Adds to each record what compares it with Muon and AdamW of the same run.

    Args:
        records: One an optimizer, with "step_s" unless it failed.
        model_s: Seconds of a train step without the block matrices' optimizer, None if unmeasured.

    Returns:
        Copies with "to_muon" and "to_adamw", ratios of optimizer steps, and with a model also
        "share", of the optimizer in its train step, and "train_to_muon", the ratio of train steps.
    """
    seconds = {r["name"]: r["step_s"] for r in records if "step_s" in r}

    def one(record: Mapping[str, Any]) -> dict[str, Any]:
        new = dict(record)
        step = seconds.get(record["name"])
        if step is None:
            return new
        new |= {
            f"to_{label}": step / seconds[name]
            for label, name in (("muon", MUON), ("adamw", "adamw"))
            if name in seconds
        }
        if model_s is not None:
            new["share"] = step / (model_s + step)
            if MUON in seconds:
                new["train_to_muon"] = (model_s + step) / (model_s + seconds[MUON])
        return new

    return [one(record) for record in records]


def write_json(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Writes a result, replacing the last one at once, so that a stop leaves a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def table(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, tuple[str, float]],
    *,
    digits: int = 3,
) -> str:
    """A markdown table; a column that no row fills is left out.

    Args:
        rows: Records; one with "error" shows that instead of figures.
        columns: {heading: (key, factor)}; the first column is always "name".
        digits: Significant ones of a figure.

    >>> print(table([{"name": "a", "step_s": 0.0123456}], {"step (ms)": ("step_s", 1e3)}))
    | | step (ms) |
    |---|---|
    | a | 12.3 |
    """
    used = {h: c for h, c in columns.items() if any(c[0] in row for row in rows)}
    lines = [f"| | {' | '.join(used)} |", "|---" * (1 + len(used)) + "|"]
    for row in rows:
        cells = [f"{row[k] * f:.{digits}g}" if k in row else "" for k, f in used.values()]
        if "error" in row:
            cells[:1] = [row["error"].splitlines()[0]]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: pathlib.Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draws the optimizers' step times as bars of their parts, and Muon's as a line."""
    timed = [row for row in rows if "step_s" in row]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.6 + 0.38 * len(timed)), dpi=110, layout="constrained")
        axes = figure.subplots()
        for y, row in enumerate(timed):
            parts = {part: row[part] for part in PARTS if part in row} or {"whole": row["step_s"]}
            left = 0.0
            for part, seconds in parts.items():
                colour = COLOURS[PARTS.index(part)] if part in PARTS else GREY
                # A difference of two measurements may come out below zero.
                width = 1e3 * max(seconds, 0.0)
                axes.barh(y, width, left=left, color=colour, label=part, height=0.7)
                left += width
            axes.text(left, y, f" {1e3 * row['step_s']:.3g}", va="center", size=10)
            if row["name"] == MUON:
                axes.axvline(1e3 * row["step_s"], color=GREY, linestyle="--", zorder=0)
        axes.set_yticks(range(len(timed)), [row["name"] for row in timed])
        axes.set_ylim(len(timed) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="optimizer step (ms)", title=title)
        labels = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(
            labels.values(), labels.keys(), loc="outside lower center", ncols=5, frameon=False
        )
        figure.savefig(path)
