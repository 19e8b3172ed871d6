"""Settings that a run recorded."""

import dataclasses
import json

import pytest

from nanogpt.config.presets import PRESETS, preset
from nanogpt.config.recorded import read_settings

RECIPES = [(name, recipe) for name, recipes in PRESETS.items() for recipe in recipes]


def plain(config):
    return json.loads(json.dumps(dataclasses.asdict(config)))


def test_every_recipe_comes_back():
    for name, recipe in RECIPES:
        config = preset(name, recipe)
        assert read_settings(plain(config)) == config


def test_settings_of_an_older_version_are_at_their_defaults():
    config = preset("cpu", "shampoo")
    recorded = plain(config)
    del recorded["tail"], recorded["model"]["remat"], recorded["matrices"]["hyperball"]
    assert read_settings(recorded) == config


@pytest.mark.parametrize(
    "change", [{"optimizer": "mine"}, {"data": {}}, {"colour": 1}, {"matrices": {"b1": 2}}]
)
def test_another_form_is_refused(change):
    with pytest.raises((LookupError, TypeError, ValueError)):
        read_settings(plain(preset("cpu", "adamw")) | change)
