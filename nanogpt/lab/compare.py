"""Draws any set of runs: comparison.png and comparison.md."""

import dataclasses
import pathlib
from collections.abc import Sequence

import tyro

from nanogpt.lab.command import command


@dataclasses.dataclass(frozen=True)
class Options:
    """Draws any set of runs."""

    runs: tyro.conf.Positional[tuple[pathlib.Path, ...]]  # folders that hold a metrics.jsonl
    out: pathlib.Path = pathlib.Path("runs")  # folder of comparison.png and comparison.md
    unchecked: bool = False  # draw runs without a fingerprint, too; the picture says which
    reference: tuple[pathlib.Path, ...] = ()  # CSV files of published curves, or their names


@command(stopped="stopped")
def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    options = tyro.cli(Options, prog="nanogpt compare", description=__doc__, args=arguments)
    # It imports matplotlib, for which no help should wait.
    from nanogpt.report.comparison import compare

    picture = compare(options.runs, options.out, options.reference, unchecked=options.unchecked)
    print((options.out / "comparison.md").read_text(encoding="utf-8"))
    print(f"picture: {picture}")
