"""Draws the board of track 3: the published results and any full-size runs beside them.

Writes track3.md and track3.png. Folders of runs are optional; those that differ only in seed and
name make a set.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import tyro

from nanogpt.lab.command import command
from nanogpt.report.curves import PUBLISHED_CURVES


@dataclasses.dataclass(frozen=True)
class Options:
    """What to draw."""

    runs: tyro.conf.Positional[tuple[pathlib.Path, ...]] = ()  # folders of full-size runs
    curves: pathlib.Path = PUBLISHED_CURVES  # folder of the published curves
    out: pathlib.Path = pathlib.Path("runs")  # folder of track3.md and track3.png


@command(stopped="stopped")
def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    options = tyro.cli(Options, prog="nanogpt records", description=__doc__, args=arguments)
    # It imports jax, for which no help should wait.
    from nanogpt.report.records import write_records

    page, picture = write_records(options.runs, options.curves, options.out)
    print(f"{page}\n{picture}")
