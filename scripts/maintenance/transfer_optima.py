"""Cells of a sweep of rates over widths: what it found, and where their optima are."""

import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nanogpt.config.presets import preset

METHODS = ("adamw", "shampoo", "soap", "muon")
WIDTHS = (32, 64, 128, 256)  # the first is the base
BELOW, ABOVE = 2, 3  # powers of 2 around the best one of the narrower model, six in all
Losses = dict[int, list[float]]  # of every power of 2, by seed


class Cell(NamedTuple):
    """One optimum: a method at a width, with the rules or without; at the base they are one.

    Of a cell that is `alone` the rate of the matrices is another one, and all other rates are those
    that are best at the base, where the matrices' is that of the best common factor.
    """

    method: str
    width: int
    rules: bool
    alone: bool = False

    @property
    def kind(self) -> str:
        """What the tables call it."""
        with_rules = "with, matrices alone" if self.alone else "with"
        return with_rules if self.rules else "without"


def cells(methods: Sequence[str]) -> list[list[Cell]]:
    """Series of cells of growing width, which begin with the same one with and without rules."""
    common = [
        [Cell(method, width, rules and width > WIDTHS[0]) for width in WIDTHS]
        for method in methods
        for rules in (False, True)
    ]
    alone = [[Cell(method, width, True, True) for width in WIDTHS] for method in methods]
    return common + alone


def read_losses(path: pathlib.Path) -> dict[Cell, Losses]:
    """Losses of every cell; a run that ended above where it began counts as the loss of chance."""
    from nanogpt.lab.trials import read_trials

    chance = math.log(preset("board", "adamw").model.vocab_size)
    found: dict[Cell, dict[int, dict[int, float]]] = {}
    records = read_trials(path)
    chosen = {method: best_others(records, method) for method in METHODS}
    for record in records:
        settings = record["settings"]
        others = settings.get("others")
        if others is not None and others != chosen[settings["optimizer"]]:
            continue
        known = (settings[name] for name in ("optimizer", "width", "rules"))
        cell = Cell(*known)._replace(alone=others is not None)
        loss = record["loss"] if record["status"] == "finished" else chance
        of_power = found.setdefault(cell, {}).setdefault(settings["power"], {})
        of_power[record["seed"]] = min(loss, chance)
    for cell in [cell for cell in found if cell.alone]:
        # Where all rates have one power, the run is that of the common factor.
        common, power = (
            cell._replace(alone=False, rules=cell.width > WIDTHS[0]),
            chosen[cell.method],
        )
        if power is not None and power in found.get(common, {}):
            found[cell].setdefault(power, found[common][power])
    return {cell: _whole(powers) for cell, powers in found.items()}


def best_others(records: Sequence[Mapping[str, Any]], method: str) -> int | None:
    """Power of the other rates whose mean loss at the base is lowest, None if none was tried."""
    losses: dict[int, list[float]] = {}
    for record in records:
        settings = record["settings"]
        searched = settings["optimizer"] == method and settings["width"] == WIDTHS[0]
        if searched and "others" in settings and settings["power"] == settings["matrices"]:
            losses.setdefault(settings["others"], []).append(record["loss"] or math.inf)
    means = {power: math.fsum(x) / len(x) for power, x in losses.items()}
    return min(means, key=means.__getitem__, default=None)


def _whole(powers: Mapping[int, Mapping[int, float]]) -> Losses:
    """As many seeds as leave at least six rates, and the rates that have them all."""
    for count in range(max(map(len, powers.values())), 0, -1):
        had = {
            p: [x[s] for s in range(count)]
            for p, x in powers.items()
            if set(range(count)) <= set(x)
        }
        if len(had) >= BELOW + ABOVE + 1:
            return dict(sorted(had.items()))
    return {}


def vertex(losses: Mapping[int, float]) -> float:
    """Where the parabola through the lowest loss and its two neighbours is lowest; nan at an edge.

    >>> vertex({0: 2.0, 1: 1.0, 2: 1.5})
    1.1666666666666667
    """
    middle = min(losses, key=losses.__getitem__)
    if not {middle - 1, middle + 1} <= set(losses):
        return math.nan
    low, least, high = (losses[middle + step] for step in (-1, 0, 1))
    curvature = low - 2 * least + high
    return middle + ((low - high) / (2 * curvature) if curvature else 0.0)


def optimum(losses: Losses) -> tuple[float, float, float]:
    """The vertex of the means over seeds, and the lowest and highest of all resampled seeds."""
    count = len(next(iter(losses.values())))

    def of(chosen: Sequence[int]) -> float:
        return vertex({p: math.fsum(x[s] for s in chosen) / count for p, x in losses.items()})

    drawn = [of(chosen) for chosen in itertools.product(range(count), repeat=count)]
    known = [x for x in drawn if math.isfinite(x)]
    return of(range(count)), min(known, default=math.nan), max(known, default=math.nan)
