"""Runs are not overwritten by accident."""

import copy
import dataclasses

import pytest

from nanogpt.config.presets import preset
from nanogpt.config.run import OutputConfig
from nanogpt.train import run_folder
from nanogpt.train.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    output = OutputConfig(str(tmp_path))
    return RunFolder(dataclasses.replace(preset("cpu", "adamw"), name="a/b", output=output))


@pytest.fixture
def used(folder):
    (folder.checkpoints / "5").mkdir(parents=True)
    folder.metrics.write_text("{}\n")
    folder.record.write_text("log")
    folder.wandb.write_text("id")
    for kept in (folder.events, folder.profile):
        kept.mkdir()
        (kept / "file").touch()
    (folder.path / "notes.txt").write_text("mine")
    return folder


def test_fresh_folder_is_made(folder, tmp_path):
    folder.claim(resume=False, overwrite=False)
    assert (tmp_path / "a" / "b").is_dir()
    assert not folder.holds_run()


@pytest.mark.parametrize("left", ["metrics", "checkpoints"])
def test_a_trace_of_a_run_is_enough_to_refuse(folder, left):
    folder.path.mkdir(parents=True)
    trace = getattr(folder, left)
    trace.mkdir() if left == "checkpoints" else trace.touch()
    with pytest.raises(FileExistsError, match="a/b already holds a run.*ARGS=--resume"):
        folder.claim(resume=False, overwrite=False)


def test_resume_keeps_everything(used):
    used.claim(resume=True, overwrite=False)
    assert used.metrics.exists() and (used.checkpoints / "5").exists()


def test_overwrite_deletes_the_run_and_nothing_else(used):
    used.claim(resume=False, overwrite=True)
    assert [path.name for path in used.path.iterdir()] == ["notes.txt"]


def test_nothing_to_resume(folder):
    with pytest.raises(FileNotFoundError, match="nothing to resume in .*a/b"):
        folder.claim(resume=True, overwrite=False)


def test_resume_and_overwrite_exclude_each_other(used):
    with pytest.raises(ValueError, match="exclude each other"):
        used.claim(resume=True, overwrite=True)
    assert used.metrics.exists()


@pytest.mark.parametrize("content", [None, ""])
def test_checkpoints_without_their_metrics_are_not_resumed(used, content):
    used.metrics.unlink() if content is None else used.metrics.write_text(content)
    with pytest.raises(FileNotFoundError, match="metrics.jsonl is missing or empty.*--overwrite"):
        used.check(resume=True, overwrite=False)
    used.check(resume=False, overwrite=True)


def test_one_process_at_a_time(used):
    """A run may outlive the terminal that it was started from, and is then resumed beside it."""
    other, fresh = copy.copy(used), copy.copy(used)
    fresh.path = used.path / "none"
    used.lock()
    used.lock()
    fresh.lock()  # there is nothing to protect yet
    with pytest.raises(ValueError, match="a/b: another process is training this run: wait"):
        other.lock()
    used.close()
    other.claim(resume=False, overwrite=True)
    with pytest.raises(ValueError, match="another process"):
        used.lock()
    other.close()


def test_checkpoints_that_cannot_be_written_are_found_at_once(used, monkeypatch):
    """They may lie on a disk of their own, which is mounted to be read alone."""
    asked = []
    monkeypatch.setattr(run_folder, "check_writable", lambda name, folder: asked.append(folder))
    used.check(resume=True, overwrite=False)
    assert asked == [used.path, used.checkpoints]


def test_a_folder_that_cannot_be_written_is_found_at_once(folder, tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(
        ValueError,
        match="output.directory: .*cannot be written, since .*/a cannot .*: set --output",
    ):
        folder.check(resume=False, overwrite=False)


@pytest.mark.parametrize("how", ["init_from", "go_on_from"])
def test_a_run_does_not_delete_the_one_that_it_begins_with(used, tmp_path, how):
    """By whatever way it is named."""
    (tmp_path / "link").symlink_to(used.path)
    output = OutputConfig(str(tmp_path))
    config = dataclasses.replace(preset("cpu", "adamw"), name="a/b", output=output)
    folder = RunFolder(dataclasses.replace(config, **{how: str(tmp_path / "link")}))
    with pytest.raises(ValueError, match="a/b holds the run to begin with.*another --name"):
        folder.claim(resume=False, overwrite=True)
    assert used.metrics.exists()
