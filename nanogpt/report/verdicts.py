"""What a set of runs proves, by the rules of the benchmark (modded-nanogpt, track 3).

A result is a number of runs of one setting, none left out, read at one step that is the same for
all of them. The rules are one-sided z-tests at p < .001 that take the standard deviation of a final
loss between seeds for .0013: .0013 * 3.1 = .004.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from nanogpt.report.curves import Curve, common_steps

TARGET = 3.28  # nats per token, track 3
MEDIUM_TARGET = 2.92  # of the medium track
THRESHOLD = 0.004
LOSS_PER_STEP = 0.0045 / 100  # what a longer schedule gains, by the benchmark's estimate
# Losses are printed with five decimals: a score that is .004 exactly must not fail in binary.
ROUNDING = 1e-9


class Result(NamedTuple):
    """Losses of several runs at one step."""

    step: int
    mean: float  # nats per token
    std: float  # sample standard deviation, nan for one run
    n: int


def result_at(runs: Sequence[Curve], step: int) -> Result:
    """Reads a set of runs at one step.

    Raises:
        ValueError: no runs, or one of them was not validated there; names run and step.
    """
    for run in runs:
        if step not in run.steps:
            raise ValueError(
                f"run {run.label!r} was not validated at step {step}: "
                f"all runs were at {common_steps(runs)}."
            )
    return summary([run.losses[run.steps.index(step)] for run in runs], step)


def summary(losses: Sequence[float], step: int) -> Result:
    """Returns mean and standard deviation of the losses of all runs at a step.

    Raises:
        ValueError: no losses.
    """
    if not losses:
        raise ValueError("no losses: a result needs those of at least one run.")
    n = len(losses)
    mean = math.fsum(losses) / n
    # Not statistics.stdev, which fails on the nan of a run that diverged.
    squares = math.fsum((loss - mean) ** 2 for loss in losses)
    return Result(step, mean, math.sqrt(squares / (n - 1)) if n > 1 else math.nan, n)


def score(result: Result, target: float = TARGET) -> float:
    """Returns (target - mean) * sqrt(n), which must be `threshold` or more.

    >>> f"{score(Result(3375, 3.27893, 0.00135, 20)):.4f}"
    '0.0048'
    """
    return (target - result.mean) * math.sqrt(result.n)


def threshold(target: float = TARGET) -> float:
    """Returns what a score must be: 0 on the medium track, whose only rule is to reach 2.92.

    >>> threshold(), threshold(MEDIUM_TARGET)
    (0.004, 0.0)
    """
    return 0.0 if target == MEDIUM_TARGET else THRESHOLD


def passes(result: Result, target: float = TARGET) -> bool:
    """Returns whether the runs prove that their setting reaches the target at that step.

    A run whose loss is not finite makes the mean nan, which does not pass.

    >>> passes(Result(3375, 3.27893, 0.00135, 20)), passes(Result(3600, 3.27765, math.nan, 1))
    (True, False)
    """
    return score(result, target) >= threshold(target) - ROUNDING


def earliest_pass(runs: Sequence[Curve], target: float = TARGET) -> Result | None:
    """Returns the result at the first step that passes, of those where all runs were validated.

    The step is chosen for all runs at once, which the rules allow; stopping each run at a step of
    its own is not.

    Returns:
        None if no step passes.
    """
    results = (result_at(runs, step) for step in common_steps(runs))
    return next((result for result in results if passes(result, target)), None)


def claim(runs: Sequence[Curve], target: float = TARGET) -> Result:
    """Returns the result at the earliest step that passes, else at the last step of all runs.

    Raises:
        ValueError: as `last_result`.
    """
    return earliest_pass(runs, target) or last_result(runs)


def last_result(runs: Sequence[Curve]) -> Result:
    """Returns the result at the last step at which all runs were validated.

    Raises:
        ValueError: no runs, or no such step; names the runs.
    """
    steps = common_steps(runs)
    if not steps:
        labels = ", ".join(run.label for run in runs) or "none"
        raise ValueError(f"no step at which all runs were validated; runs: {labels}.")
    return result_at(runs, steps[-1])


def pairwise_score(new: Result, old: Result) -> float:
    """Returns how much better `new` is than `old`, in units of one run's uncertainty.

    ((mean_old - mean_new) + (step_old - step_new) * .0045 / 100) / sqrt(1/n_old + 1/n_new)

    Saved steps count as the loss that they would have gained.

    >>> f"{pairwise_score(Result(3250, 3.27866, 0, 10), Result(3325, 3.27905, 0, 20)):.4f}"
    '0.0097'
    """
    gain = old.mean - new.mean + (old.step - new.step) * LOSS_PER_STEP
    return gain / math.sqrt(1 / old.n + 1 / new.n)


def beats(new: Result, old: Result) -> bool:
    """Returns whether `new` is proven better than `old`: a pairwise score of .004 or more."""
    return pairwise_score(new, old) >= THRESHOLD - ROUNDING


def verdict_line(losses: Sequence[float], target: float = TARGET) -> str:
    """Returns the acceptance rule applied to the final losses of all runs, in words.

    Args:
        losses: nats per token, of every run that was started with this setting.
        target: loss to reach.

    >>> verdict_line([3.27656, 3.27675])
    'accepted: mean 3.27665, std 0.00013, n=2: (3.28 - mean) * sqrt(n) = 0.00473 >= 0.004'
    """
    result = summary(losses, 0)
    sign, word = (">=", "accepted") if passes(result, target) else ("<", "not accepted")
    std = f", std {result.std:.5f}" if result.n > 1 else ""
    return (
        f"{word}: mean {result.mean:.5f}{std}, n={result.n}: "
        f"({target:g} - mean) * sqrt(n) = {score(result, target):.5f} {sign} {threshold(target):g}"
    )
