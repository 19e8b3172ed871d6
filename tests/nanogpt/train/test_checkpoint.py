"""Checkpoints: what belongs to them is checked, what is in them comes back bit for bit."""

import dataclasses
import errno
import json
import os
import shutil
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt.config.presets import preset
from nanogpt.config.run import OutputConfig
from nanogpt.train import checkpoint
from nanogpt.train.checkpoint import Checkpoints
from nanogpt.train.digests import DamagedError, write_digests


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


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1])), "is not what was saved"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is not what was saved"),
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.with_name("more").touch(), "does not belong to it"),
    ],
)
def test_damage_is_refused_or_passed_over(tmp_path, config, saved, spoil, complaint):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in ("3", "4"):
        (tmp_path / step).rename(folder / step)
    spoil(next((folder / "4" / "state" / "d").iterdir()))
    checkpoints, data = Checkpoints(folder, config, "data-1"), batches()
    with pytest.raises(DamagedError, match=f"4 is damaged: .*{complaint}.*previous-good"):
        checkpoints.newest()
    step, passed_over = checkpoints.newest(go_back=True)
    assert step == 3 and len(passed_over) == 1 and complaint in passed_over[0]
    restored, _ = checkpoints.restore(3, state(0), data)
    assert restored.params["w"][1, 2] == 15.0 and next(data) == saved_at(4)
    checkpoints.set_aside(3)
    assert (tmp_path / "damaged" / "4").is_dir()
    checkpoints.save(4, state(4, scale=9), data, seconds=0.0)  # the place is free
    checkpoints.close()
    assert Checkpoints(folder, config, "data-1").newest() == (4, [])


@pytest.mark.parametrize(
    "name", ["04", "4x", "\N{SUPERSCRIPT TWO}", "-4", "4.orbax-checkpoint-tmp"]
)
def test_folders_of_other_names_are_no_checkpoints(tmp_path, name):
    (tmp_path / name).mkdir()
    assert checkpoint.saved_steps(tmp_path) == []


def crafted(folder, change):
    """Changes what lies beside the state, by somebody who can write digests, too."""
    file = folder / "meta" / "metadata"
    told = json.loads(file.read_bytes())
    told = change(told) or told
    file.write_text(json.dumps(told))
    write_digests(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta.pop("config") and None,
        lambda meta: meta.pop("train_time_s") and None,
        lambda meta: meta.update(train_time_s="x"),
        lambda meta: meta["config"].pop("schedule") and None,
        lambda meta: meta["config"]["schedule"].update(steps="x"),
        lambda meta: meta["stored"].pop("format") and None,
        lambda meta: meta["stored"].update(shapes=0),
        lambda meta: [0],
    ],
)
def test_what_lies_beside_the_state_without_its_names_is_refused(tmp_path, config, saved, change):
    crafted(tmp_path / "4", change)
    checkpoints = Checkpoints(tmp_path, config, "data-1")
    with pytest.raises(ValueError, match=r"/4 is (not as this version|damaged: meta holds no)"):
        checkpoints.restore(4, state(0), batches())


@pytest.mark.parametrize("file", ["_METADATA", "manifest.ocdbt"])
def test_arrays_that_orbax_cannot_read_are_refused_in_a_sentence(tmp_path, config, saved, file):
    """Where the digests are right: the disk failed in between, or somebody made them anew."""
    (tmp_path / "4" / "state" / file).write_text('{"x": {}}')
    checkpoints = Checkpoints(tmp_path, config, "data-1")
    with pytest.raises(ValueError) as told:
        checkpoints.restore(4, state(0), batches())
    assert "\n" not in str(told.value) and str(tmp_path / "4") in str(told.value)


def test_the_position_of_the_data_without_its_name_is_refused(tmp_path, config, saved):
    (tmp_path / "4" / "data" / "process_0-of-1.json").write_text("{}")
    with pytest.raises(ValueError, match=r"process_0-of-1\.json is not as this version writes it"):
        Checkpoints(tmp_path, config, "data-1").restore(4, state(0), batches())


def test_records_without_the_settings_of_a_run_are_refused(tmp_path, config):
    path, identity = tmp_path / "metrics.jsonl", {"data": "d", "validation": "v"}
    checkpoints = Checkpoints(tmp_path, config, "data-1")
    start = {"kind": "start", "config": checkpoint.plain(config)}
    for wrong in ({"kind": "start"}, {"config": start["config"]}, {"kind": "val", "step": 1}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="metrics.jsonl does not begin with a run's settings"):
            checkpoints.check_start(path, identity)
    for wrong in ({"config": {}}, {"fingerprint": {"data": "d"}}, {"fingerprint": [0]}):
        path.write_text(json.dumps(start | wrong))
        with pytest.raises(ValueError, match="metrics.jsonl is not as this version writes it"):
            checkpoints.check_start(path, identity)


@pytest.mark.parametrize("wrong", [b"", b"\xff", b"{}", b"[" * 100_000])
def test_damaged_older_checkpoints_do_not_keep_the_best_from_being_kept(tmp_path, config, wrong):
    """Nor do they count among them."""
    output = OutputConfig(str(tmp_path), keep_checkpoints=1, keep_every=1, keep_best=1)
    config = dataclasses.replace(config, output=output)
    for steps in ((1, 2, 3), (4, 5)):
        checkpoints, data = Checkpoints(tmp_path, config, "data-1"), batches()
        for step in steps:
            grain.experimental.set_next_index(data, step)
            checkpoints.save(step, state(step), data, seconds=0.0, loss=float(step))
        checkpoints.close()
        output = dataclasses.replace(output, keep_every=0)
        config = dataclasses.replace(config, output=output)
        for file in ("meta/metadata", "_CHECKPOINT_METADATA"):
            (tmp_path / "1" / file).write_bytes(wrong) if 3 in steps else None
    assert checkpoint.saved_steps(tmp_path) == [2, 5]
    assert Checkpoints(tmp_path, config, "data-1").newest(go_back=True) == (5, [])


def saved_at(position):
    data = batches()
    return [next(data) for _ in range(position)][-1]


def test_without_a_sound_checkpoint_there_is_nothing_to_go_back_to(tmp_path, config, saved):
    """One without digests was not saved whole, or by another version."""
    for step in ("3", "4"):
        (tmp_path / step / "digests.json").unlink()
    with pytest.raises(DamagedError, match="digests.json is missing. None of 2 .* --overwrite"):
        Checkpoints(tmp_path, config, "data-1").newest(go_back=True)


def test_half_a_checkpoint_does_not_count(tmp_path, config, saved):
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    assert Checkpoints(tmp_path, config, "data-1").newest() == (4, [])


def test_other_processes_position_is_this_ones(tmp_path, config, saved):
    """Grain writes a file a process; of another number of processes only the step counts."""
    told = tmp_path / "4" / "data" / "process_0-of-1.json"
    checkpoints, data = Checkpoints(tmp_path, config, "data-1"), batches()
    told.rename(told.with_name("process_0-of-2.json"))
    checkpoints.restore(4, state(0), data)
    assert [next(data) for _ in range(5)] == saved
    told.write_text('{"next_index": 3}')
    with pytest.raises(ValueError, match="tells of 3 batches, the state of 4 updates"):
        checkpoints.restore(4, state(0), data)


def test_what_the_settings_name_is_kept(tmp_path, config):
    """Of 9 steps that cool down after 6: the last, the best, every fourth, and 6."""
    output = OutputConfig(str(tmp_path), keep_checkpoints=1, keep_every=4, keep_best=1)
    schedule = dataclasses.replace(config.schedule, steps=10, cooldown=0.5)
    config = dataclasses.replace(config, output=output, schedule=schedule)
    for steps in (range(1, 6), range(6, 10)):  # a second process knows the losses of the first
        checkpoints, data = Checkpoints(tmp_path, config, "data-1"), batches()
        for step in steps:
            grain.experimental.set_next_index(data, step)
            loss = {"loss": abs(step - 3.0)} if step != 2 else {}
            checkpoints.save(step, state(step), data, seconds=0.0, **loss)
        checkpoints.close()
    found = {path.name for path in tmp_path.iterdir() if path.name.isdigit()}
    assert found == {"3", "4", "6", "8", "9"}


def test_another_runs_options_may_be_tuned_but_not_its_own(tmp_path, config, saved):
    matrices = dataclasses.replace(config.matrices, learning_rate=0.5)
    other = dataclasses.replace(config, matrices=matrices, go_on_from="elsewhere")
    checkpoints, data = Checkpoints(tmp_path, other, "data-1"), batches()
    restored, _ = checkpoints.restore(4, state(0), data)
    checkpoints.save(5, restored._replace(step=jax.numpy.int32(5)), data, seconds=0.0)
    checkpoints.close()
    again = dataclasses.replace(other, matrices=config.matrices)
    with pytest.raises(ValueError, match=r"matrices\.learning_rate=0\.5"):
        Checkpoints(tmp_path, again, "data-1").restore(5, state(0), batches())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Error writing x [OS error 28: No space left on device]"),
    ],
)
def test_a_full_disk_costs_no_older_checkpoint(tmp_path, config, saved, monkeypatch, error):
    def full(folder):
        raise error

    checkpoints, data = Checkpoints(tmp_path, config, "data-1"), batches()
    monkeypatch.setattr(checkpoint, "write_digests", full)
    checkpoints.save(5, state(5), data, seconds=0.0)
    with pytest.raises(OSError, match="No space left") as told:
        checkpoints.wait()
    assert told.value.errno == errno.ENOSPC and told.value.filename == str(tmp_path)
    checkpoints.close()
    assert Checkpoints(tmp_path, config, "data-1").newest() == (4, [])
    assert {path.name for path in tmp_path.iterdir() if path.name.isdigit()} == {"3", "4"}


def test_a_save_that_orbax_gives_up_is_told_in_a_sentence(tmp_path, config, saved, monkeypatch):
    """It measures by the clock of the day, which may be set."""
    checkpoints = Checkpoints(tmp_path, config, "data-1")

    def give_up():
        raise TimeoutError("ChainedFuture completed 3/4 futures but timed out")

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", give_up)
    with pytest.raises(TimeoutError, match=r"the clock was set forward\. Go on with --resume"):
        checkpoints.wait()
    monkeypatch.undo()
    checkpoints.close()


def test_what_is_no_file_or_no_folder_of_its_own_is_refused(tmp_path, config, saved):
    """A pipe is never read to its end, and a link could not be deleted later."""
    checkpoints = Checkpoints(tmp_path, config, "data-1")
    manifest = tmp_path / "4" / "state" / "manifest.ocdbt"
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(DamagedError, match=r"4 is damaged: state/manifest.ocdbt is no file"):
        checkpoints.newest()
    shutil.rmtree(tmp_path / "4")
    (tmp_path / "3").rename(tmp_path / "elsewhere")
    (tmp_path / "3").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedError, match="3 is a link: put there what it leads to"):
        checkpoints.newest()
