"""Complete runs by name: the published recipes at full size, and two small copies for a CPU."""

import dataclasses
from typing import Any

from nanogpt.config.board import BOARD
from nanogpt.config.published import PUBLISHED
from nanogpt.config.recipes import NS12, Recipe
from nanogpt.config.run import (
    AuxiliaryConfig,
    Config,
    DataConfig,
    ModelConfig,
    ScheduleConfig,
)
from nanogpt.config.settings import AdamWConfig, MatrixConfig, MuonConfig, ShampooConfig

# Optimizers that `nanogpt.optimizers.build.register` added to this process, with the settings that
# each starts from.
OWN: dict[str, MatrixConfig] = {}

TRACK3: dict[str, Recipe] = {name: published.recipe for name, published in PUBLISHED.items()}

# How these rates were found: docs/demo.md.
CPU_STEPS = 300
CPU_AUXILIARY = AuxiliaryConfig(0.3, 0.01, 0.01)
CPU: dict[str, Recipe] = {
    "adamw": Recipe(
        "adamw",
        AdamWConfig(0.004, weight_decay=0.1),
        CPU_AUXILIARY,
        ScheduleConfig(CPU_STEPS, warmup_steps=20),
    ),
    "muon": Recipe(
        "muon",
        MuonConfig(0.04, weight_decay=0.025),
        CPU_AUXILIARY,
        ScheduleConfig(CPU_STEPS),
    ),
    "muon_track3": Recipe(
        "muon_track3",
        MuonConfig(0.02, weight_decay=0.025, **NS12),
        CPU_AUXILIARY,
        ScheduleConfig(CPU_STEPS),
    ),
    "shampoo": Recipe(
        "shampoo",
        ShampooConfig(0.01, weight_decay=0.1),
        CPU_AUXILIARY,
        ScheduleConfig(CPU_STEPS),
    ),
}


def preset(name: str, optimizer: str) -> Config:
    """Looks up a complete run.

    Args:
        name: "track3" (162M parameters, FineWeb, a GPU), "cpu" (1.3M parameters, minutes: the
            demo) or "board" (the scaled-down board of all optimizers).
        optimizer: A recipe of the preset, as "adamw", "muon", "muon_track3", "shampoo"; the others
            are listed by `PRESETS[name][0]`, those of track3 explained by
            `nanogpt.config.published.PUBLISHED`. Or an optimizer added by
            `nanogpt.optimizers.build.register`.

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
    recipes, base = PRESETS[name]
    if optimizer in recipes:
        recipe = recipes[optimizer]
    elif optimizer in OWN:
        recipe = recipes["adamw"]._replace(optimizer=optimizer, matrices=OWN[optimizer])
    else:
        raise ValueError(
            f"optimizer={optimizer!r} is unknown in preset {name!r}: "
            f"choose one of {', '.join(recipes)}."
        )
    return _complete(base, f"{name}-{optimizer}", recipe)


def is_own(name: str) -> bool:
    """Tells whether an optimizer was added by `register`: other processes do not know it."""
    return name in OWN


def _complete(base: Config, name: str, recipe: Recipe) -> Config:
    """The base with a recipe's settings, each where it belongs."""
    settings = recipe._asdict()
    model = dataclasses.replace(base.model, init=settings.pop("init"))
    return dataclasses.replace(base, name=name, model=model, **settings)


# Every preset replaces these by a recipe's.
_NO_RECIPE: dict[str, Any] = {
    name: getattr(CPU["adamw"], name) for name in ("optimizer", "matrices", "auxiliary", "schedule")
}
_TRACK3_BASE = Config(
    name="track3",
    seed=0,
    model=ModelConfig(
        vocab_size=50304,
        num_layers=12,
        model_dim=768,
        head_dim=128,
        mlp_dim=3072,
        sequence_length=1024,
    ),
    data=DataConfig(
        directory="data/fineweb10B",
        mode="sequential",
        batch_rows=512,
        microbatch_rows=16,
        val_tokens=20 * 524288,
    ),
    mesh="data=-1",
    **_NO_RECIPE,
)
_CPU_BASE = Config(
    name="cpu",
    seed=0,
    model=ModelConfig(
        vocab_size=2048,
        num_layers=4,
        model_dim=128,
        head_dim=64,
        mlp_dim=512,
        sequence_length=256,
        dtype="float32",
        embed_dtype="float32",
    ),
    data=DataConfig(
        directory="data/sotu",
        mode="shuffled",
        batch_rows=8,
        microbatch_rows=8,
        val_tokens=65536,
    ),
    val_every=40,
    val_every_final=20,
    **_NO_RECIPE,
)
# 100 runs in an hour or two: a step of AdamW takes 0.05 s of one core.
_BOARD_BASE = dataclasses.replace(
    _CPU_BASE,
    name="board",
    model=dataclasses.replace(
        _CPU_BASE.model,
        vocab_size=1024,
        num_layers=2,
        model_dim=64,
        head_dim=32,
        mlp_dim=256,
        sequence_length=128,
    ),
    data=dataclasses.replace(_CPU_BASE.data, directory="data/board", val_tokens=16384),
    val_every=30,
    val_every_final=30,
)
PRESETS: dict[str, tuple[dict[str, Recipe], Config]] = {
    "track3": (TRACK3, _TRACK3_BASE),
    "cpu": (CPU, _CPU_BASE),
    "board": (BOARD, _BOARD_BASE),
}
