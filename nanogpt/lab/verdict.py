"""Says what sets of runs prove by the benchmark's rules.

Give CSV files of published runs, each a set, and folders of runs: those that differ only in seed
and name make a set. Printed for every set: mean and standard deviation of its losses at the
earliest step that passes the acceptance rule, or at the last step of all its runs; whether it
passes; and for every two sets whether one is proven better.
"""

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Sequence

import tyro

from nanogpt.report.curves import COLUMN
from nanogpt.report.verdicts import TARGET


@dataclasses.dataclass(frozen=True)
class Options:
    """What to read."""

    runs: tyro.conf.Positional[tuple[pathlib.Path, ...]]  # folders; CSV files or their names
    target: float = TARGET  # loss to reach, nats per token; 2.92 for the medium track
    column: str = COLUMN  # losses of the CSV files; those of averaged weights are in val_ema_loss


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = tyro.cli(Options, prog="nanogpt verdict", description=__doc__, args=arguments)
    try:
        print(verdicts(options))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def verdicts(options: Options) -> str:
    """Returns everything that is printed, in Markdown."""
    # They import matplotlib, for which no help should wait.
    from nanogpt.report.groups import read_groups
    from nanogpt.report.verdict_tables import acceptance_table, pairwise_rule, pairwise_table, rule

    groups = read_groups(options.runs, options.column)
    parts = [rule(options.target), acceptance_table(groups, options.target)]
    if len(groups) > 1:
        pairs = itertools.combinations(groups, 2)
        parts += [pairwise_rule(), pairwise_table(pairs, options.target)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
