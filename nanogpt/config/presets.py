"""Complete runs by name: the published recipes at full size, and two small copies for a CPU."""

from nanogpt.config.recipes import RECIPES, read_table
from nanogpt.config.run import Config, DataConfig, ModelConfig
from nanogpt.config.settings import MatrixConfig

PRESETS = RECIPES  # of each preset the recipes, by optimizer
_SHARED = read_table("presets.toml")

# Optimizers that `nanogpt.optimizers.build.register` added to this process, with the settings that
# each starts from.
OWN: dict[str, MatrixConfig] = {}


def preset(name: str, optimizer: str) -> Config:
    """Looks up a complete run.

    Args:
        name: "track3" (162M parameters, FineWeb, a GPU), "cpu" (1.3M parameters, minutes: the
            demo) or "board" (the scaled-down board of all optimizers).
        optimizer: A recipe of the preset, as "adamw", "muon", "muon_track3", "shampoo"; the others
            are listed by `PRESETS[name]`, those of track3 explained by
            `nanogpt.config.recipes.PUBLISHED`. Or an optimizer added by
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
    recipes, shared = PRESETS[name], dict(_SHARED[name])
    if optimizer in recipes:
        recipe = recipes[optimizer]
    elif optimizer in OWN:
        recipe = recipes["adamw"]._replace(optimizer=optimizer, matrices=OWN[optimizer])
    else:
        raise ValueError(
            f"optimizer={optimizer!r} is unknown in preset {name!r}: "
            f"choose one of {', '.join(recipes)}."
        )
    settings = recipe._asdict()
    model = ModelConfig(**shared.pop("model"), init=settings.pop("init"))
    data = DataConfig(**shared.pop("data"))
    return Config(f"{name}-{optimizer}", seed=0, model=model, data=data, **settings, **shared)


def is_own(name: str) -> bool:
    """Tells whether an optimizer was added by `register`: other processes do not know it."""
    return name in OWN
