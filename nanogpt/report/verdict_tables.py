"""The benchmark's verdicts over sets of runs, as tables."""

import itertools
import math
import pathlib
from collections.abc import Iterable, Sequence

from nanogpt.report.comparable import TARGETS, common_track
from nanogpt.report.curves import COLUMN
from nanogpt.report.groups import Group, read_groups
from nanogpt.report.tables import markdown, shown
from nanogpt.report.verdicts import (
    LOSS_PER_STEP,
    TARGET,
    THRESHOLD,
    beats,
    claim,
    pairwise_score,
    passes,
    score,
    threshold,
)


def verdicts(
    paths: Sequence[pathlib.Path],
    target: float | None = None,
    unchecked: bool = False,
    column: str = COLUMN,
) -> str:
    """Returns in Markdown what sets of runs prove; arguments as in `read_groups`.

    Raises:
        ValueError: a target that is no loss, or none and runs of no track; runs that cannot be
            read or compared.
    """
    if target is not None and not 0 < target < math.inf:
        raise ValueError(f"target={target}: must be positive and finite, in nats per token.")
    groups = read_groups(paths, column, unchecked=unchecked)
    if target is None:
        published = [group.label for group in groups if group.reference]
        starts = {group.label: group.start for group in groups if not group.reference}
        track = common_track(published, starts)
        if track is None:
            raise ValueError(
                "no target: these runs are of no track of the benchmark, whose 3.28 would mean "
                "nothing for them. Say by --target which loss they are to reach."
            )
        target = TARGETS[track]
    parts = [rule(target), acceptance_table(groups, target)]
    if len(groups) > 1:
        pairs = itertools.combinations(groups, 2)
        parts += [pairwise_rule(), pairwise_table(pairs, target)]
    return "\n\n".join(parts)


def rule(target: float = TARGET) -> str:
    """Returns the acceptance rule in words."""
    least = f"{threshold(target):g}"
    return f"Accepted if ({target:g} - mean) * sqrt(n) >= {least}, for n runs at one step."


def pairwise_rule() -> str:
    """Returns the pairwise rule in words."""
    return (
        "A is proven better than B if (B's mean - A's mean + (B's step - A's step) * "
        f"{LOSS_PER_STEP:g}) / sqrt(1/n of A + 1/n of B) >= {THRESHOLD}."
    )


def acceptance_table(groups: Sequence[Group], target: float = TARGET) -> str:
    """Returns a row for every set: what it reaches, and whether that is accepted.

    A set is read at the earliest step that passes, or if none does at the last step of all its
    runs. If a set has a published value, there is a column for it.

    Raises:
        ValueError: a set whose runs share no step; names the runs.
    """
    head = ["runs", "n", "read at step", "mean", "std", "score", "verdict", "earliest passing step"]
    rows = []
    for group in groups:
        result = claim(group.runs, target)
        accepted = passes(result, target)
        rows.append(
            [
                *(group.label, str(result.n), str(result.step), f"{result.mean:.5f}"),
                shown(result.std, ".5f"),
                f"{score(result, target):.5f}",
                *(("accepted", str(result.step)) if accepted else ("not accepted", "none")),
                group.published or "-",
            ]
        )
    if any(group.published for group in groups):
        return markdown([*head, "published"], rows)
    return markdown(head, [row[:-1] for row in rows])


def pairwise_table(pairs: Iterable[tuple[Group, Group]], target: float = TARGET) -> str:
    """Returns a row for every pair of sets, the one with the higher score first.

    Every set is read where `acceptance_table` reads it.

    Raises:
        ValueError: a set whose runs share no step; names the runs.
    """
    rows = []
    for a, b in pairs:
        first, second = claim(a.runs, target), claim(b.runs, target)
        if pairwise_score(first, second) < pairwise_score(second, first):
            (a, first), (b, second) = (b, second), (a, first)
        better = "A is better" if beats(first, second) else "not proven"
        rows.append([a.label, b.label, f"{pairwise_score(first, second):.5f}", better])
    return markdown(["A", "B", "score", "verdict"], rows)
