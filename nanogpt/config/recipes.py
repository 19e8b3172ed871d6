"""The optimizers' table, optimizers.toml: which there are, with which settings, from where."""

import dataclasses
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any, NamedTuple

from nanogpt.config.run import (
    AuxiliaryConfig,
    CooldownConfig,
    Init,
    ScheduleConfig,
    WarmCooldownConfig,
)
from nanogpt.config.settings import SETTINGS, MatrixConfig


class Recipe(NamedTuple):
    """What distinguishes one optimizer's run from another's."""

    optimizer: str  # name of its direction
    matrices: MatrixConfig
    auxiliary: AuxiliaryConfig
    schedule: ScheduleConfig
    matrices_cooldown: CooldownConfig | None = None
    init: Init = "benchmark"


@dataclasses.dataclass(frozen=True)
class Published:
    """A recipe and what is known of it.

    Attributes:
        recipe: Settings, as published unless `note` says otherwise.
        source: Where they were published.
        expected_steps: Step whose validation loss is the result; the schedule may be longer.
        expected_loss: Mean validation loss there.
        expected_runs: Runs that the mean is of.
        inside_rules: Whether every step is one forward-backward pass, as the benchmark demands.
        same_model: Whether the published runs trained this model on these data.
        note: What is not as published, or not known.
    """

    recipe: Recipe
    source: str
    expected_steps: int | None = None
    expected_loss: float | None = None
    expected_runs: int | None = None
    inside_rules: bool = True
    same_model: bool = True
    note: str = ""


def read_table(name: str) -> dict[str, Any]:
    """Reads a table of this folder; its lists become tuples, as settings want them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return tuple(map(plain, value)) if isinstance(value, list) else value

    return plain(tomllib.loads((pathlib.Path(__file__).parent / name).read_text(encoding="utf-8")))


def _recipe(direction: str, table: Mapping[str, Any]) -> Recipe:
    """A recipe as its table of a preset says it."""
    rest, own = table["auxiliary"], table.get("matrices_cooldown")
    warm = WarmCooldownConfig if own and "warmup_steps" in own else CooldownConfig
    return Recipe(
        direction,
        SETTINGS[direction](**table["matrices"]),
        AuxiliaryConfig(**(_AUXILIARY[rest] if isinstance(rest, str) else rest)),
        ScheduleConfig(**table["schedule"]),
        None if own is None else warm(**own),
        table.get("init", "benchmark"),
    )


_TABLES = read_table("optimizers.toml")
_AUXILIARY = _TABLES.pop("auxiliary")
# By preset, then by optimizer.
RECIPES: dict[str, dict[str, Recipe]] = {
    preset: {
        name: _recipe(table.get("direction", name), table[preset])
        for name, table in _TABLES.items()
        if preset in table
    }
    for preset in ("track3", "cpu", "board")
}
PUBLISHED: dict[str, Published] = {
    name: Published(
        RECIPES["track3"][name],
        **{key: value for key, value in table.items() if key not in ("direction", *RECIPES)},
    )
    for name, table in _TABLES.items()
}
