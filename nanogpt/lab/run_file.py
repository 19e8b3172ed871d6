"""A run's settings as a file in YAML or JSON: the sections and names of `Config`."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from nanogpt.config.run import Config

CHOICES = ("preset", "optimizer")  # what the file may say beside the settings


# What yaml raises for text that only looks like a number or a date.
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class _PlainLoader(yaml.SafeLoader):
    """Reads what a file spells out: a few names for parts of itself could stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses an alias where a value should be."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*name) are not read: {self.peek_event().start_mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Refuses a name that stands twice, of which YAML would take the last."""
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name} stands twice in one section: {node.start_mark}")
        return super().construct_mapping(node, deep)


def read(path: str) -> dict[str, Any]:
    """Returns what a file holds; of YAML only plain data is read, so a file cannot run code.

    Raises:
        ValueError: no such file, no YAML or JSON, something else than names with values, or a
            preset or optimizer that is no name.
    """
    try:
        found = yaml.load(pathlib.Path(path).read_text(encoding="utf-8"), _PlainLoader)  # noqa: S506
    except OSError as error:
        raise ValueError(f"--config {path}: cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, *_MALFORMED) as error:
        raise ValueError(f"--config {path}: is neither YAML nor JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"--config {path}: must hold names with values, as --print-config writes them."
        )
    for name in CHOICES:
        if not isinstance(found.get(name), str | None):
            raise ValueError(f"--config {path}: {name}={found[name]!r}: must be a name.")
    return found


def chosen(path: str) -> dict[str, Any]:
    """Returns what a file says about preset and optimizer."""
    settings = read(path)
    return {name: settings[name] for name in CHOICES if settings.get(name)}


def words(settings: Mapping[str, Any], default: Config) -> list[str]:
    """Returns the command line that gives the same settings, so that both are checked alike.

    Args:
        settings: of a file.
        default: the run whose values they replace.

    >>> from nanogpt.config.presets import preset
    >>> words({"model": {"num_layers": 2}, "mesh": None}, preset("cpu", "adamw"))
    ['--model.num-layers', '2', '--mesh', 'None']
    """
    own = {name: value for name, value in settings.items() if name not in CHOICES}
    return [word for name, value in own.items() for word in _words(str(name), value, default)]


def text(preset: str, recipe: str, config: Config) -> str:
    """Returns a run's settings in YAML, in the order of `Config`.

    Args:
        preset: that the run starts from.
        recipe: of the preset; several train one optimizer.
        config: the run.
    """
    found = {"preset": preset, **dataclasses.asdict(config), "optimizer": recipe}
    plain = json.loads(json.dumps(found))  # tuples become lists
    return yaml.safe_dump(plain, sort_keys=False)


def _words(name: str, value: Any, default: Any) -> Iterator[str]:
    before = default
    for part in name.split("."):
        before = getattr(before, part.replace("-", "_"), None)
    section, dot, field = name.replace("_", "-").rpartition(".")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _words(f"{name}.{key}", inner, default)
    elif value is None and before is None:
        return  # a part that the run does not have has no flag
    elif isinstance(value, bool) and before is not None:
        yield f"--{section}{dot}{field}" if value else f"--{section}{dot}no-{field}"
    else:
        yield f"--{section}{dot}{field}"
        yield from _leaves(value)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield str(value)
