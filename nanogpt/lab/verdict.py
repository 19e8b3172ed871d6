"""Says what sets of runs prove by the benchmark's rules.

Give CSV files of published runs, each a set, and folders of runs: those that differ only in seed
and name make a set. Printed for every set: mean and standard deviation of its losses at the
earliest step that passes the acceptance rule, or at the last step of all its runs; whether it
passes; and for every two sets whether one is proven better.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import tyro

from nanogpt.lab.command import command
from nanogpt.report.curves import COLUMN

if TYPE_CHECKING:
    from nanogpt.report.groups import Group


@dataclasses.dataclass(frozen=True)
class Options:
    """What to read."""

    runs: tyro.conf.Positional[tuple[pathlib.Path, ...]]  # folders; CSV files or their names
    target: float | None = None  # loss to reach, nats per token; None: the one of the runs' track
    unchecked: bool = False  # take runs without a fingerprint, too
    column: str = COLUMN  # losses of the CSV files; those of averaged weights are in val_ema_loss


@command(stopped="stopped")
def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    options = tyro.cli(Options, prog="nanogpt verdict", description=__doc__, args=arguments)
    print(verdicts(options))


def verdicts(options: Options) -> str:
    """Returns everything that is printed, in Markdown."""
    # They import matplotlib, for which no help should wait.
    from nanogpt.report.groups import read_groups
    from nanogpt.report.verdict_tables import acceptance_table, pairwise_rule, pairwise_table, rule

    groups = read_groups(options.runs, options.column, unchecked=options.unchecked)
    target = options.target or _target(groups)
    parts = [rule(target), acceptance_table(groups, target)]
    if len(groups) > 1:
        pairs = itertools.combinations(groups, 2)
        parts += [pairwise_rule(), pairwise_table(pairs, target)]
    return "\n\n".join(parts)


def _target(groups: "Sequence[Group]") -> float:
    """The loss that the track of the runs is about."""
    from nanogpt.report.comparable import TARGETS, common_track

    published = [group.label for group in groups if group.reference]
    configs = {group.label: group.config for group in groups if not group.reference}
    track = common_track(published, configs)
    if track is None:
        raise ValueError(
            "no target: these runs are of no track of the benchmark, whose 3.28 would mean nothing "
            "for them. Say by --target which loss they are to reach."
        )
    return TARGETS[track]
