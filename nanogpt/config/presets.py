"""Complete runs by name, and which optimizers there are, with which settings, from where.

The numbers are in optimizers.toml, a table an optimizer, and what the runs of a preset share in
presets.toml.
"""

import dataclasses
import pathlib
import tomllib
from typing import Any

from nanogpt.config.run import (
    AuxiliaryConfig,
    Config,
    CooldownConfig,
    DataConfig,
    LookaheadConfig,
    ModelConfig,
    OutputConfig,
    ScheduleConfig,
    TailConfig,
)
from nanogpt.config.settings import SETTINGS, MatrixConfig


@dataclasses.dataclass(frozen=True)
class Published:
    """What is known of an optimizer's recipe for track 3.

    Attributes:
        source: Where the settings were published, which are those, unless `note` says otherwise.
        expected_steps: Step whose validation loss is the result; the schedule may be longer.
        expected_loss: Mean validation loss there.
        expected_runs: Runs that the mean is of.
        inside_rules: Whether every step is one forward-backward pass, as the benchmark demands.
        same_model: Whether the published runs trained this model on these data.
        complete: Whether all settings are published, initial weights included, and are these.
        note: What is not as published, or not known.
    """

    source: str
    expected_steps: int | None = None
    expected_loss: float | None = None
    expected_runs: int | None = None
    inside_rules: bool = True
    same_model: bool = True
    complete: bool = True
    note: str = ""


def _read_table(name: str) -> dict[str, Any]:
    """Reads a table of this folder; its lists become tuples, as settings want them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return tuple(map(plain, value)) if isinstance(value, list) else value

    return plain(tomllib.loads((pathlib.Path(__file__).parent / name).read_text(encoding="utf-8")))


def _read_recipes() -> dict[str, Any]:
    """Tables of all optimizers; those of the medium track have a file of their own."""
    tables = _read_table("optimizers.toml")
    for name, more in _read_table("medium.toml").items():
        tables[name] |= more
    return tables


_SHARED, _TABLES = _read_table("presets.toml"), _read_recipes()
_AUXILIARY = _TABLES.pop("auxiliary")
# Of each preset the names of its recipes.
PRESETS = {name: tuple(o for o, table in _TABLES.items() if name in table) for name in _SHARED}
PUBLISHED = {
    name: Published(**{k: v for k, v in table.items() if k not in ("direction", *PRESETS)})
    for name, table in _TABLES.items()
}
# Optimizers that `nanogpt.optimizers.build.register` added to this process, with the settings that
# each starts from.
OWN: dict[str, MatrixConfig] = {}


def preset(name: str, optimizer: str) -> Config:
    """Looks up a complete run.

    Args:
        name: "track3" (162M parameters, FineWeb, a GPU), "medium" (454M, eight GPUs), "cpu" (1.3M
            parameters, minutes: the demo), "board" (the scaled-down board of all optimizers),
            "board_m" (the recipe's larger one) or "medium_board" (that of the medium track).
        optimizer: A recipe of the preset, as "adamw", "muon", "muon_track3", "shampoo"; the others
            are listed by `PRESETS[name]`, those of track3 explained by `PUBLISHED`. Or an optimizer
            added by `nanogpt.optimizers.build.register`, for which the rest is AdamW's.

    Returns:
        The run's configuration, named "{name}-{optimizer}".

    Raises:
        ValueError: Unknown name or optimizer.

    Example:
        >>> preset("track3", "shampoo").schedule.steps
        3375
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is unknown: choose one of {', '.join(PRESETS)}.")
    known = optimizer in PRESETS[name]
    if not known and not is_own(optimizer):
        raise ValueError(
            f"optimizer={optimizer!r} is unknown in preset {name!r}: "
            f"choose one of {', '.join(PRESETS[name])}."
        )
    table, shared = _TABLES[optimizer if known else "adamw"], dict(_SHARED[name])
    direction = table.get("direction", optimizer) if known else optimizer
    recipe, rest = table[name], table[name]["auxiliary"]
    own_model = {key: recipe[key] for key in ("init", "kernel_rounding") if key in recipe}
    own, ahead, tail = map(recipe.get, ("matrices_cooldown", "lookahead", "tail"))
    return Config(
        f"{name}-{optimizer}",
        seed=0,
        model=ModelConfig(**shared.pop("model") | own_model),
        data=DataConfig(**shared.pop("data")),
        output=OutputConfig(**shared.pop("output", {})),
        schedule=ScheduleConfig(**recipe["schedule"]),
        optimizer=direction,
        matrices=SETTINGS[direction](**recipe["matrices"]) if known else OWN[optimizer],
        auxiliary=AuxiliaryConfig(**(_AUXILIARY[rest] if isinstance(rest, str) else rest)),
        matrices_cooldown=None if own is None else CooldownConfig(**own),
        lookahead=None if ahead is None else LookaheadConfig(**ahead),
        tail=None if tail is None else TailConfig(**tail),
        **shared,
    )


def published(name: str, optimizer: str) -> Published | None:
    """What is known of a recipe of a track, None for presets that are none.

    >>> published("medium", "muon_mlp_decay").expected_loss
    2.91975
    """
    if name == "track3":
        return PUBLISHED.get(optimizer)
    known = _TABLES.get(optimizer, {}).get(name, {}).get("published")
    return Published(**known) if known else None


def is_own(name: str) -> bool:
    """Tells whether an optimizer was added by `register`: other processes do not know it."""
    return name in OWN
