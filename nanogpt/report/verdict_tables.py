"""The benchmark's verdicts over sets of runs, as tables."""

import math
from collections.abc import Iterable, Sequence

from nanogpt.report.groups import Group
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
)


def rule(target: float = TARGET) -> str:
    """Returns the acceptance rule in words."""
    return f"Accepted if ({target:g} - mean) * sqrt(n) >= {THRESHOLD}, for n runs at one step."


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
                shown(result.std if math.isfinite(result.std) else None, ".5f"),
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
