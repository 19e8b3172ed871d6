"""Real processes that are killed, stopped, started twice and left without room for what they save.

What happens is done by the processes to themselves, at a batch or in a save, so that no test
depends on how fast this machine is; `make faults` does it from outside, at random moments, see
docs/faults.md.

What goes on does so in this process, so in another one than that which ended, and so does the run
that nothing happens to.
"""

import dataclasses
import os
import signal

import pytest

from nanogpt import cli
from nanogpt.train import loop
from scripts.maintenance.faulting import bucket
from scripts.maintenance.faulting.hooked import Batches
from scripts.maintenance.faulting.rig import Rig, differences

AT = 13  # in the second epoch, in the middle of every interval and between two checkpoints
# Of the direction's kind each: elementwise; roots that are kept for an interval; bases that are
# kept, on a hyperball, with a schedule of the matrices' own.
RECIPES = ("shampoo", "soap_h")


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    """Shards that all runs here share; compiled programs are the suite's."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "compiled").symlink_to(os.environ["JAX_COMPILATION_CACHE_DIR"])
    return Rig(folder, preset="board", steps=24).with_shards()


@pytest.fixture(scope="module")
def straight(rig):
    """The run that nothing happens to."""
    cli.main(rig.words("straight"))
    return rig.runs / "straight"


def go_on(rig, name):
    """Goes on in this process; returns what differs from the run that nothing happened to."""
    cli.main(rig.words(name, "--resume"))
    return differences(rig.runs / "straight", rig.runs / name, rig.steps)


def test_runs_go_on_bit_for_bit_in_another_process(rig, straight):
    kinds = {
        name: dataclasses.replace(rig, optimizer=name, every=0, more=("--name", name))
        for name in RECIPES
    }
    for name, kind in kinds.items():
        cli.main(kind.words("", "--name", f"straight-{name}"))
    first, *others = kinds.values()
    lines = [word for kind in others for word in ("--", *kind.words(""))]
    ended = first.start("", *lines, accidents=[f"stop={AT}"]).end()
    assert ended.output.count("ended 143") == len(RECIPES), ended.output
    for name, kind in kinds.items():
        assert kind.checkpoints(name) == [AT + 1]
        cli.main(kind.words("", "--resume"))
        assert differences(rig.runs / f"straight-{name}", rig.runs / name, rig.steps) == []


def test_a_run_killed_while_it_saves_goes_on(rig, straight):
    ended = rig.start("saving", accidents=["save=3"]).end()
    assert ended.code == -signal.SIGKILL, ended.output
    assert rig.checkpoints("saving") == [3, 6] and len(rig.half_saved("saving")) == 1
    assert go_on(rig, "saving") == []
    assert not rig.half_saved("saving")


def test_a_run_is_not_started_twice_and_goes_on_when_it_is_killed(rig, straight):
    child = rig.start("twice", accidents=["freeze=8"])
    assert child.stopped(), child.end().output
    with pytest.raises(SystemExit, match="error: .*another process is training this run"):
        cli.main(rig.words("twice", "--resume"))
    child.send(signal.SIGKILL)
    assert child.end().code == -signal.SIGKILL
    assert rig.checkpoints("twice")  # the one of step 3 was waited for by that of step 6
    assert go_on(rig, "twice") == []


def test_a_run_stopped_while_it_compiles_says_so_and_leaves_nothing(rig):
    # Of another width, so that nothing is compiled yet.
    ended = rig.start("compiling", "--model.mlp-dim", "40", accidents=["compile=1"]).end()
    assert ended.code == 128 + signal.SIGTERM, ended.output
    assert "stopped before the first step" in ended.output and "Traceback" not in ended.output
    assert not rig.holds_run("compiling")


def test_a_disk_without_room_is_said_in_a_sentence_and_costs_no_checkpoint(rig, straight):
    """A limit on the size of a file stands for the disk: the same call of the system fails."""
    ended = rig.start("full", accidents=["limit=8:9000"]).end()
    assert ended.code == 1, ended.output
    assert ended.output.count("the disk is full: make room") == 1 and "--resume" in ended.output
    assert rig.checkpoints("full") in ([3], [3, 6])  # the save of 6 may not have been done
    assert go_on(rig, "full") == []


def test_a_run_in_an_object_store_goes_on_bit_for_bit(rig, straight, tmp_path, monkeypatch):
    places = ("--output.directory", f"{bucket.NAME}/runs", "--output.checkpoint-every", "7")
    words = rig.words("there", *places)
    with bucket.stand_in(tmp_path / "bucket") as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        bucket.join()
        objects = bucket.Objects(tmp_path / "bucket")
        with monkeypatch.context() as patched:
            patched.setattr(loop, "to_device", Batches([f"stop={AT}"]))
            with pytest.raises(SystemExit, match="143"):
                cli.main(words)
        # As a process leaves it that is killed in a save: all of it under its number, no end.
        saved = "runs/there/checkpoints/"
        for key in objects.keys(f"{saved}{AT + 1}/"):
            if key != f"{saved}{AT + 1}/commit_success.txt":
                objects.put(key.replace(f"/{AT + 1}/", "/15/"), objects.get(key)[0])
        with pytest.raises(SystemExit, match="already holds a run"):
            cli.main(words)
        cli.main([*words, "--resume"])
        objects.copy_to(tmp_path, "runs/")
    assert differences(straight, tmp_path / "runs" / "there", rig.steps) == []
    kept = sorted(path.name for path in (tmp_path / saved).iterdir())
    assert kept == ["21", "24", "7"]  # the newest two, and the last one before the cooldown
