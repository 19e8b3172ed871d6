"""Settings as a run recorded them, read back."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from nanogpt.config.run import Config
from nanogpt.config.settings import SETTINGS


def read_settings(recorded: Mapping[str, Any]) -> Config:
    """The run that `dataclasses.asdict` gave, and JSON gave back.

    Settings that an older version did not have are at their defaults.

    Args:
        recorded: by name; lists stand for tuples.

    Raises:
        LookupError, TypeError, ValueError: another form, a setting that this version does not
            have, a value that it refuses, or an optimizer that was registered by a program.

    >>> from nanogpt.config.presets import preset
    >>> config = preset("cpu", "shampoo")
    >>> read_settings(dataclasses.asdict(config)) == config
    True
    """
    matrices = SETTINGS[recorded["optimizer"]]
    return _read(Config, dict(recorded) | {"matrices": _read(matrices, recorded["matrices"])})


def _read(kind: Any, value: Any) -> Any:
    """A value of a type; those of no class of settings are as JSON has them, but for tuples."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    classes = [option for option in options if dataclasses.is_dataclass(option)]
    if isinstance(value, list):
        return tuple(_read(Any, inner) for inner in value)
    if not classes or not isinstance(value, Mapping):
        return value
    hints = typing.get_type_hints(classes[0])
    return classes[0](**{name: _read(hints[name], inner) for name, inner in value.items()})
