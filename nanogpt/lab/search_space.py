"""Points of a search: which values of which settings a sweep tries."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import numpy as np
import tyro

from nanogpt.config.run import check_name
from nanogpt.config.settings import check, check_types
from nanogpt.lab.command_line import DEMO

Point = dict[str, str]  # a value, as on the command line, for each dotted name
Draw = Callable[[np.random.Generator], str]
Axes = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep tries."""

    preset: str = "cpu"  # where settings start, as of `nanogpt train`
    config: str | None = None  # file with settings of all trials, in YAML or JSON
    optimizers: tuple[str, ...] = DEMO  # as in the preset
    grid: Axes = ()  # values of a setting, NAME=A,B,...
    random: Axes = ()  # draw a setting between A and B: NAME=log:A:B; lin for uniform
    runs: int | None = None  # trials an optimizer; None: the whole grid
    search_seed: int = 0  # of the draws
    name: str = "sweep"  # folder of the trials under runs/
    jobs: int = 1  # trials side by side, each in a process; CPU only
    # One program for trials that differ in seed, the matrices' rate and a factor of others, a run a
    # call: for many short runs. They leave no curve, and one that is stopped starts again.
    shared: bool = False

    def __post_init__(self):
        check_types(self)
        check(self, "at least 1", "jobs", "runs")
        check(self, "at least 0", "search_seed")
        check_name(self.name)
        if not self.optimizers:
            raise ValueError("optimizers=(): a sweep needs at least one.")


def parse_list(text: str) -> tuple[str, tuple[str, ...]]:
    """Reads NAME=A,B,...; a name may be spelt as a flag, with hyphens.

    Raises:
        ValueError: anything else, or a value twice.

    >>> parse_list("matrices.learning_rate=0.01,0.02")
    ('matrices.learning_rate', ('0.01', '0.02'))
    """
    name, _, values = text.partition("=")
    found = tuple(values.split(","))
    if not name or not all(found) or len(set(found)) < len(found):
        raise ValueError(f"--grid {text}: must be NAME=A,B,... with different values.")
    return name.replace("-", "_"), found


def parse_range(text: str) -> tuple[str, Draw]:
    """Reads NAME=log:LOW:HIGH or NAME=lin:LOW:HIGH; a name may be spelt as a flag, with hyphens.

    Returns:
        The name, and a function that draws a number of four digits, uniformly, or with log
        uniformly in its logarithm: enough, and it can be read.

    Raises:
        ValueError: anything else, LOW not below HIGH, or a logarithm of what is not positive.

    >>> name, draw = parse_range("matrices.learning-rate=log:1e-3:1e-1")
    >>> name, draw(np.random.default_rng(0))
    ('matrices.learning_rate', '0.01879')
    """
    name, _, values = text.partition("=")
    scale, _, ends = values.partition(":")
    try:
        low, high = (float(end) for end in ends.split(":"))
    except ValueError:
        low = high = math.nan
    above = 0.0 if scale == "log" else -math.inf
    if not name or scale not in ("log", "lin") or not above < low < high < math.inf:
        raise ValueError(
            f"--random {text}: must be NAME=log:LOW:HIGH or NAME=lin:LOW:HIGH with LOW < HIGH, "
            "above 0 for log."
        )
    if scale == "log":
        low, high = math.log(low), math.log(high)
        return name.replace("-", "_"), lambda random: f"{math.exp(random.uniform(low, high)):.4g}"
    return name.replace("-", "_"), lambda random: f"{random.uniform(low, high):.4g}"


def points(
    lists: Mapping[str, Sequence[str]],
    ranges: Mapping[str, Draw] | None = None,
    runs: int | None = None,
    seed: int = 0,
) -> list[Point]:
    """Chooses the points of a search.

    A larger `runs` only adds points, so a search can be widened and keeps what it has.

    Args:
        lists: Values of each setting; every combination is a point.
        ranges: Settings drawn at random; the combinations take turns, so each gets as many draws.
        runs: Number of points. Without ranges, at most so many, a random choice of the combinations
            if there are more; None: all of them.
        seed: Of the random numbers.

    Returns:
        One {name: value} a point.

    Raises:
        ValueError: ranges without `runs`, or `runs` below 1.

    Example:
        >>> points({"a": "12", "b": "3"})
        [{'a': '1', 'b': '3'}, {'a': '2', 'b': '3'}]
    """
    if runs is not None and runs < 1:
        raise ValueError(f"runs={runs}: must be at least 1.")
    combinations = [
        dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())
    ]
    random = np.random.default_rng(seed)
    if not ranges:
        order = random.permutation(len(combinations))[:runs]
        return [combinations[index] for index in sorted(order)]
    if runs is None:
        raise ValueError("runs=None: say by --runs how many points to draw.")
    return [
        combinations[index % len(combinations)]
        | {name: draw(random) for name, draw in ranges.items()}
        for index in range(runs)
    ]
