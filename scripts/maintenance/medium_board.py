"""The medium track's model scaled down: every entry tuned, three seeds, beside the small board.

    python -m scripts.maintenance.medium_board runs/medium_board --out docs

The rule for rates is that of `nanogpt board`, with up to 6 runs an entry. Trials that differ in
seed and rate of the matrices share a compiled program; finished ones are kept in trials.jsonl.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from nanogpt.config.presets import PRESETS, preset
from nanogpt.lab.board import BASELINE, TUNING_SEED, Plan, best, loss_of, make_trial, next_powers
from nanogpt.lab.preset_data import prepare_data
from nanogpt.lab.shared_programs import run_shared
from nanogpt.lab.trials import Trial, run_trials
from nanogpt.report.plotting import WIDTH, Label, label_ends, looks, save
from nanogpt.report.tables import markdown

NAME = "medium_board"
PLAN = Plan(NAME, None, (-1, 0, 1), 6, (0, 1, 2), timed_steps=0, preset=NAME)


class Entry(NamedTuple):
    """What came of an optimizer."""

    name: str
    tuned: dict[int, float]  # power of 2 of the preset's rate: loss, inf where it diverged
    losses: list[float]  # of the final seeds


def train(name: str, path: Path) -> Entry:
    """Tunes an entry and trains it from every seed; what the file holds is not done again."""

    def losses(trials: list[Trial]) -> list[float]:
        return [loss_of(record) for record in run_trials(trials, path, run=run_shared)]

    tuned: dict[int, float] = {}
    while powers := next_powers(tuned, PLAN.start, PLAN.most):
        found = losses([make_trial(name, PLAN, "tune", p, TUNING_SEED) for p in powers])
        tuned |= dict(zip(powers, found, strict=True))
    finals = [make_trial(name, PLAN, "final", best(tuned), seed) for seed in PLAN.seeds]
    return Entry(name, tuned, losses(finals))


def table(entries: Sequence[Entry], small: Mapping[str, float]) -> str:
    """All entries, best first, with their place among those that the small board has as well."""
    both = sorted((e for e in entries if e.name in small), key=lambda e: small[e.name])
    place = {entry.name: str(i) for i, entry in enumerate(both, 1)}
    rows = []
    for entry in sorted(entries, key=lambda e: statistics.mean(e.losses)):
        power = best(entry.tuned)
        rate = preset(NAME, entry.name).matrices.learning_rate * 2.0**power
        edge = ", at the edge" * (power in (min(entry.tuned), max(entry.tuned)))
        mean, spread = statistics.mean(entry.losses), statistics.stdev(entry.losses)
        told = f"{small[entry.name]:.4f}" if entry.name in small else ""
        rows.append(
            [entry.name, f"{mean:.4f}", f"{spread:.4f}", f"{rate:.4g}{edge}", told]
            + [place.get(entry.name, "")]
        )
    heads = ["optimizer", "final loss", "std", "rate", "small board", "place there"]
    return markdown(heads, rows)


def small_board(path: Path) -> dict[str, float]:
    """Losses of the table of docs/leaderboard/board.md."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > 3 and cells[0] in PRESETS["board"] and cells[0] not in found:
            found[cells[0]] = float(cells[3])  # after the numbers of runs and steps
    return found


def draw(entries: Sequence[Entry], small: Mapping[str, float]) -> Figure:
    """A line for each entry from its loss on the small board to the one here, minus AdamW's."""
    means = {e.name: statistics.mean(e.losses) for e in entries if e.name in small}
    shown = sorted((name for name in means if math.isfinite(means[name])), key=means.__getitem__)
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.subplots()
    labels = []
    for name, (colour, dashes) in zip(shown, looks(shown), strict=True):
        ends = small[name] - small[BASELINE], means[name] - means[BASELINE]
        axes.plot((0, 1), ends, marker="o", color=colour, linestyle=dashes)
        labels.append(Label(name, 1, ends[1], colour))
    axes.set_xticks((0, 1), ("small board\n2 layers", "medium board\n16 layers"))
    axes.set_xlim(-0.1, 1.1)
    axes.set_ylabel("final loss minus AdamW's\n(nats per token)")
    label_ends(axes, labels, 3.8)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Trains what is missing, and prints the table; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="of trials.jsonl")
    parser.add_argument("--entries", nargs="+", default=list(PRESETS[NAME]))
    parser.add_argument("--small", type=Path, default=Path("docs/leaderboard/board.md"))
    parser.add_argument("--out", type=Path, help="folder of medium_board.png")
    options = parser.parse_args(argv)
    prepare_data(preset(NAME, "adamw"))
    entries = [train(name, options.folder / "trials.jsonl") for name in options.entries]
    small = small_board(options.small)
    print(table(entries, small))
    for entry in entries:
        base = preset(NAME, entry.name).matrices.learning_rate
        tried = (f"{base * 2.0**p:.4g}: {loss:.4f}" for p, loss in sorted(entry.tuned.items()))
        print(f"{entry.name}: {', '.join(tried)}")
    if options.out:
        save(options.out / "medium_board.png", lambda: draw(entries, small))
    return 0


if __name__ == "__main__":
    sys.exit(main())
