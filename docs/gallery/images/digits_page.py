"""Table and picture of `docs.gallery.images.digits`: its part of docs/images.md."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from docs.gallery.images.digits import FIRST, SEEDS, TUNING
from nanogpt.report.plotting import SMALL, headed, looks, save
from nanogpt.report.tables import markdown

BEGIN, END = "<!-- written by make images -->", "<!-- until here -->"
Runs = Mapping[str, Mapping[str, Any]]


def write(folder: pathlib.Path, runs: Runs, page: pathlib.Path) -> None:
    """Writes digits.png, digits-dark.png, and the tables of the page between their marks.

    Args:
        folder: of the pictures.
        runs: of `digits.read_runs`.
        page: Markdown with the marks.

    Raises:
        ValueError: the page has no marks.
    """
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"{page}: no {BEGIN!r} with {END!r} behind it.")
    tables = f"\n\n{results(runs)}\n\n{tried(runs)}\n\n"
    page.write_text(before + BEGIN + tables + END + after, encoding="utf-8")
    save(folder / "digits.png", lambda: picture(runs))


def judged(runs: Runs, name: str) -> list[Mapping[str, Any]]:
    """The runs of an optimizer's judged seeds: those at the rate that they were trained at."""
    return [r for r in runs.values() if r["optimizer"] == name and r["seed"] in SEEDS]


def mean(values: Sequence[float], form: str) -> str:
    """Mean and standard error, as text.

    >>> mean([1.0, 2.0, 3.0], ".2f")
    '2.00 ± 0.58'
    """
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):{form}} ± {error:{form}}"


def results(runs: Runs) -> str:
    """What the judged seeds of every optimizer came to."""
    rows = []
    for name in FIRST:
        own = judged(runs, name)
        rows.append([
            name, f"{own[0]['rate']:g}",
            mean([100 * r["test_accuracy"] for r in own], ".2f"),
            mean([r["test_loss"] for r in own], ".4f"),
            mean([r["validation_loss"] for r in own], ".4f"),
            f"{1e3 * min(r['step_processor_s'] for r in own):.1f}",
        ])  # fmt: skip
    head = ["optimizer", "rate", "test accuracy (%)", "test loss (nats)", "validation loss"]
    return markdown([*head, "processor time of a step (ms)"], rows)


def tried(runs: Runs) -> str:
    """Validation loss of every rate of the tuning seed, the lowest in bold."""
    rows = []
    for name in FIRST:
        own = {r["rate"]: r for r in runs.values() if (r["optimizer"], r["seed"]) == (name, TUNING)}
        best = min(own.values(), key=lambda r: r["validation_loss"])
        told = [
            f"{'**' * (r is best)}{rate:g}: {r['validation_loss']:.4f}{'**' * (r is best)}"
            for rate, r in sorted(own.items())
        ]
        rows.append([name, ", ".join(told)])
    return markdown(["optimizer", "rate: validation loss of the tuning seed"], rows, texts=2)


def picture(runs: Runs) -> Figure:
    """Validation loss by step, mean and range of seeds; test errors, a dot a seed."""
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    curves, dots = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, (name, (colour, dash)) in enumerate(zip(FIRST, looks(list(FIRST)), strict=True)):
        own = judged(runs, name)
        steps = [point[0] for point in own[0]["curve"]]
        losses = np.array([[point[1] for point in run["curve"]] for run in own])
        curves.plot(steps, losses.mean(0), color=colour, linestyle=dash, label=name, linewidth=2)
        curves.fill_between(
            steps, losses.min(0), losses.max(0), color=colour, alpha=0.18, linewidth=0
        )
        errors = [100 * (1 - run["test_accuracy"]) for run in own]
        dots.plot([place] * len(errors), errors, "o", color=colour, markersize=5)
        dots.plot([place - 0.25, place + 0.25], [np.mean(errors)] * 2, color=colour, linewidth=2)
    curves.set(yscale="log", xlabel="step", ylabel="validation loss (nats)")
    curves.legend(frameon=False, fontsize=SMALL)
    dots.set_xticks(range(len(FIRST)), list(FIRST), rotation=30, fontsize=SMALL)
    dots.set(ylabel="test errors (%)", xlim=(-0.6, len(FIRST) - 0.4))
    dots.set_ylim(bottom=0)
    count = len(SEEDS)
    headed(
        figure, "A small ResNet on 8 x 8 digits",
        f"mean and range of {count} seeds; right: a dot is a seed, a line their mean",
    )  # fmt: skip
    return figure
