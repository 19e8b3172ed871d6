"""Checkpoints: what belongs to them is checked, what is in them comes back bit for bit."""

import dataclasses
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt.config.presets import preset
from nanogpt.config.run import OutputConfig
from nanogpt.train.checkpoint import Checkpoints
from nanogpt.train.compatible import first_difference


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: tuple


def state(step: int, scale: float = 1.0) -> State:
    weights = {"w": scale * jnp.arange(6.0).reshape(2, 3), "e": jnp.full(3, 0.1, jnp.bfloat16)}
    return State(jnp.int32(step), weights, (jnp.int32(step), None, ()))


def batches():
    return iter(grain.MapDataset.range(100).shuffle(seed=1).to_iter_dataset())


@pytest.fixture
def config(tmp_path):
    return dataclasses.replace(preset("cpu", "muon"), output=OutputConfig(str(tmp_path)))


@pytest.fixture
def saved(tmp_path, config):
    """A folder with checkpoints 2, 3, 4, of which the default keeps two; returns what follows."""
    checkpoints, data = Checkpoints(tmp_path, config, "data-1"), batches()
    for step in (1, 2, 3, 4):
        next(data)
        if step > 1:
            checkpoints.save(step, state(step, scale=step), data, seconds=1.5 * step)
    checkpoints.close()
    return [next(data) for _ in range(5)]


def test_state_data_and_time_come_back(tmp_path, config, saved):
    checkpoints, data = Checkpoints(tmp_path, config, "data-1"), batches()
    assert checkpoints.newest() == (4, [])
    restored, seconds = checkpoints.restore(4, state(0), data)
    jax.tree.map(np.testing.assert_array_equal, restored, state(4, scale=4))
    assert jax.tree.structure(restored) == jax.tree.structure(state(4))
    assert restored.params["e"].dtype == jnp.bfloat16
    assert [next(data) for _ in range(5)] == saved
    assert seconds == 6.0
    checkpoints.close()


def test_newest_are_kept(tmp_path, config, saved):
    assert {path.name for path in tmp_path.iterdir() if path.name.isdigit()} == {"3", "4"}


def test_saving_a_step_again_changes_nothing(tmp_path, config, saved):
    checkpoints, data = Checkpoints(tmp_path, config, "data-1"), batches()
    checkpoints.save(4, state(4, scale=99), data, seconds=0.0)
    checkpoints.wait()
    restored, seconds = checkpoints.restore(4, state(0), data)
    assert restored.params["w"][1, 2] == 20.0 and seconds == 6.0
    checkpoints.close()


def test_other_settings_are_refused_by_name(tmp_path, config, saved):
    model = dataclasses.replace(config.model, mlp_dim=8)
    checkpoints = Checkpoints(tmp_path, dataclasses.replace(config, model=model), "data-1")
    with pytest.raises(ValueError, match=r"model\.mlp_dim=512, this run has model\.mlp_dim=8"):
        checkpoints.restore(4, state(0), batches())
    checkpoints.close()


def test_another_optimizer_is_not_blamed_on_its_recipe(tmp_path, saved):
    other = dataclasses.replace(preset("cpu", "adamw"), name="cpu-muon")  # has a warmup, too
    checkpoints = Checkpoints(tmp_path, other, "data-1")
    with pytest.raises(ValueError, match="optimizer='muon' trained it, this run has optimizer='ad"):
        checkpoints.restore(4, state(0), batches())
    checkpoints.close()


def test_other_data_are_refused(tmp_path, config, saved):
    checkpoints = Checkpoints(tmp_path, config, "data-2")
    with pytest.raises(ValueError, match=r"data\.directory='data/sotu' are not those"):
        checkpoints.restore(4, state(0), batches())
    checkpoints.close()


def test_places_and_names_may_change(tmp_path, config, saved):
    moved = dataclasses.replace(
        config,
        name="other",
        output=OutputConfig("elsewhere", log_every=3),
        data=dataclasses.replace(config.data, directory="elsewhere"),
    )
    checkpoints = Checkpoints(tmp_path, moved, "data-1")
    assert checkpoints.restore(4, state(0), batches())[0].step == 4
    checkpoints.close()


def test_renamed_checkpoint_is_refused(tmp_path, config, saved):
    (tmp_path / "4").rename(tmp_path / "7")
    checkpoints = Checkpoints(tmp_path, config, "data-1")
    with pytest.raises(ValueError, match="7 holds a state of step 4"):
        checkpoints.restore(7, state(0), batches())
    checkpoints.close()


def test_first_difference_looks_inside_and_in_order():
    before = {"a": 1, "b": {"c": [1, 2], "d": 0}, "output": {"x": 1}}
    assert first_difference(before, before) is None
    assert first_difference(before, before | {"output": 5}) is None
    now = {"a": 1, "b": {"c": [1, 3], "d": 1}, "output": {"x": 1}}
    assert first_difference(before, now) == ("b.c", [1, 2], [1, 3])
    assert first_difference(before, before | {"new": 7}) == ("new", None, 7)
