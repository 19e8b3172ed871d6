"""Runs that begin with another run."""

import dataclasses
import shutil

import pytest

from nanogpt.config.run import OutputConfig, ScheduleConfig
from nanogpt.config.settings import ShampooConfig
from nanogpt.train.loop import fit
from nanogpt.train.metrics import read_records
from nanogpt.train.run_folder import RunFolder
from tests.nanogpt.train.test_loop import assert_equal, losses, records, saved, shards, tiny

__all__ = ["shards"]  # a fixture


@pytest.fixture(scope="module")
def parent(shards, tmp_path_factory):
    """Ten steps, of which the last seven cool down, with every checkpoint."""
    output = OutputConfig(
        str(tmp_path_factory.mktemp("parent")), log_every=1, checkpoint_every=2, keep_checkpoints=9
    )
    config = tiny(shards, "", output=output)
    fit(config)
    return config


@pytest.mark.parametrize("optimizer", ["adamw", "shampoo"])
def test_parameters_of_another_run(shards, tmp_path, parent, optimizer):
    config = tiny(shards, tmp_path, optimizer=optimizer, schedule=ScheduleConfig(1))
    config = dataclasses.replace(config, init_from=str(RunFolder(parent).path))
    fit(config)
    assert records(config, "val")[0]["loss"] == records(parent, "val")[-1]["loss"]
    assert "begun with" in records(config)[0]["fingerprint"]["model"]


def test_begun_with_tells_the_parameters_and_not_where_they_lie(shards, tmp_path, parent):
    """Also of a run that is resumed before its first checkpoint: it begins with them, too."""
    (tmp_path / "link").symlink_to(RunFolder(parent).path)
    shorter = tiny(shards, tmp_path, "shorter", schedule=ScheduleConfig(1))
    fit(shorter)
    models = []
    for number, source in enumerate((RunFolder(parent).path, "link", RunFolder(shorter).path)):
        config = tiny(shards, tmp_path, f"on-{number}", schedule=ScheduleConfig(1))
        config = dataclasses.replace(config, init_from=str(tmp_path / source))
        fit(config)
        models.append(records(config)[0]["fingerprint"]["model"])
    assert models[0] == models[1] != models[2]
    before = losses(config)
    shutil.rmtree(RunFolder(config).checkpoints)
    lines = RunFolder(config).metrics.read_text().splitlines(keepends=True)
    RunFolder(config).metrics.write_text("".join(lines[:2]))
    fit(config, resume=True)
    assert losses(config) == before


def test_a_run_does_not_replace_the_one_that_it_begins_with(shards, tmp_path):
    config = tiny(shards, tmp_path, schedule=ScheduleConfig(1))
    fit(config)
    before = records(config)
    for how in ("init_from", "go_on_from"):
        again = dataclasses.replace(config, **{how: str(RunFolder(config).path)})
        with pytest.raises(ValueError, match="run holds the run to begin with"):
            fit(again, overwrite=True)
    assert records(config) == before and saved(config, 1)


def test_a_model_of_other_sizes_is_refused(shards, tmp_path, parent):
    config = dataclasses.replace(
        tiny(shards, tmp_path),
        model=dataclasses.replace(parent.model, mlp_dim=16),
        init_from=str(RunFolder(parent).path),
    )
    with pytest.raises(ValueError, match="has model.mlp_dim=32, this one 16: set --model.mlp-dim"):
        fit(config)
    with pytest.raises(ValueError, match="init_from='nowhere': holds no run.*metrics.jsonl"):
        fit(dataclasses.replace(config, init_from="nowhere"))
    assert not RunFolder(config).path.exists()


def test_more_steps_go_on_from_before_the_cooldown(shards, tmp_path, parent):
    """Bit for bit what the longer run is from its beginning; the parent stays as it was.

    In the benchmark's order, in which a longer run reads more shards.
    """
    data = dataclasses.replace(parent.data, mode="sequential")
    output = dataclasses.replace(parent.output, directory=str(tmp_path))
    short = dataclasses.replace(parent, name="short", data=data, output=output)
    long = dataclasses.replace(short, name="long", schedule=ScheduleConfig(14))
    fit(short)
    fit(long)
    before = records(short)
    config = dataclasses.replace(long, name="on", go_on_from=str(RunFolder(short).path))
    fit(config)
    assert [record["step"] for record in records(config, "resume")] == [4]
    assert losses(config) == losses(long)
    assert_equal(saved(config, 14), saved(long, 14))
    assert records(config)[0]["config"]["schedule"]["steps"] == 14
    assert records(short) == before
    end = read_records(RunFolder(config).metrics)[-1]
    assert fit(config, resume=True) == end


def test_the_step_that_is_missing_is_named(shards, tmp_path, parent):
    only = tiny(shards, tmp_path, "only")  # has its last checkpoint alone
    fit(only)
    config = tiny(shards, tmp_path, "on", schedule=ScheduleConfig(14))
    config = dataclasses.replace(config, go_on_from=str(RunFolder(only).path))
    with pytest.raises(ValueError, match="a checkpoint of step 4 or before is missing.*10.*every"):
        fit(config)
    assert not RunFolder(config).path.exists()
    longer = dataclasses.replace(only, schedule=ScheduleConfig(14))
    with pytest.raises(ValueError, match="schedule.steps=10, this run has schedule.steps=14"):
        fit(longer, resume=True)


def test_a_run_goes_on_with_other_options(shards, tmp_path):
    """Rate, interval and root of the state's own factors; not blocks that are cut otherwise."""
    output = OutputConfig(str(tmp_path), log_every=1, checkpoint_every=4)
    parent = tiny(shards, tmp_path, "parent", "shampoo", output=output)
    fit(parent)
    other = ShampooConfig(0.02, 0.1, every=3, cutoff="shift", damping=1e-6)
    config = dataclasses.replace(
        parent,
        name="on",
        schedule=ScheduleConfig(14),
        matrices=other,
        auxiliary=dataclasses.replace(parent.auxiliary, head_learning_rate=0.02),
        go_on_from=str(RunFolder(parent).path),
    )
    fit(config)
    assert [record["step"] for record in records(config, "resume")] == [4]
    before, after = (records(one, "train") for one in (parent, config))
    assert [one["loss"] for one in after[:5]] == [one["loss"] for one in before[:5]]
    assert after[4]["learning_rate"] == pytest.approx(0.02)
    assert after[5]["loss"] != before[5]["loss"] and after[-1]["loss"] < after[4]["loss"]
    cut = dataclasses.replace(config, name="cut", matrices=dataclasses.replace(other, block_size=8))
    with pytest.raises(ValueError, match="cannot resume from .*has .*: it was made .*other opt"):
        fit(cut)
    assert not RunFolder(cut).path.exists()


@pytest.mark.parametrize("how", ["init_from", "go_on_from"])
def test_a_damaged_checkpoint_is_not_begun_with(shards, tmp_path, parent, how):
    copied = tmp_path / "parent"
    shutil.copytree(RunFolder(parent).path, copied)
    step = "10" if how == "init_from" else "4"
    (copied / "checkpoints" / step / "meta" / "metadata").write_bytes(b"{}")
    config = tiny(shards, tmp_path, "on", schedule=ScheduleConfig(14), **{how: str(copied)})
    with pytest.raises(ValueError, match=f"{how}: checkpoint .*{step} is damaged: meta/metadata"):
        fit(config)
    assert not RunFolder(config).path.exists()
