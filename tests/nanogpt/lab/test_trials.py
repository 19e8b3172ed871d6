"""Trials: one file, one writer. What they record is tested with the sweep."""

import dataclasses
import fcntl
import json
import threading

import pytest

from nanogpt.config.presets import preset
from nanogpt.lab import trials
from nanogpt.lab.trials import Trial, run_trial, run_trials
from nanogpt.train.nonfinite import DivergedError
from nanogpt.train.run_folder import RunFolder


def test_a_second_process_waits_for_the_file(tmp_path, monkeypatch):
    path, said = tmp_path / "sweep" / "trials.jsonl", threading.Event()
    monkeypatch.setattr(trials, "print", lambda _: said.set(), raising=False)
    assert run_trials([], path) == []
    second = threading.Thread(target=run_trials, args=([], path))
    with open(f"{path}.lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        second.start()
        assert said.wait(30)
        assert second.is_alive()
    second.join(30)
    assert not second.is_alive()


@pytest.mark.parametrize(
    ("checkpoint", "fits", "asked"),
    [
        (False, True, ["overwrite"]),
        (True, True, ["resume"]),
        (True, False, ["resume", "overwrite"]),
    ],
)
def test_a_stopped_trial_goes_on_if_its_settings_fit(
    checkpoint, fits, asked, tmp_path, monkeypatch
):
    config = preset("board", "adamw")
    output = dataclasses.replace(config.output, directory=str(tmp_path))
    folder = RunFolder(dataclasses.replace(config, output=output))
    folder.checkpoints.mkdir(parents=True)
    if checkpoint:
        (folder.checkpoints / "5").mkdir()
    calls = []

    def fit(config, *, resume=False, overwrite=False, console):
        calls.append("resume" * resume + "overwrite" * overwrite)
        if resume and not fits:
            raise ValueError("it was saved with seed=1")

    monkeypatch.setattr(trials, "fit", fit)
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):  # this fit writes none
        run_trial(Trial({}, dataclasses.replace(config, output=output)))
    assert calls == asked


def test_one_trial_that_fails_does_not_keep_the_others_from_training(tmp_path, monkeypatch, capsys):
    base = preset("board", "adamw")
    made = [Trial({"seed": s}, dataclasses.replace(base, name=f"run-{s}", seed=s)) for s in (0, 1)]

    def run(trial):
        if trial.config.seed == 0:
            raise MemoryError("no room for 8192 x 8192")
        return {"name": trial.config.name, "loss": 3.0, "status": "finished"}

    monkeypatch.setattr(trials, "run_trial", run)
    monkeypatch.setattr(trials, "_identities", lambda made: [t.config.name for t in made])
    path = tmp_path / "trials.jsonl"
    with pytest.raises(RuntimeError, match="1 of 2 trials failed, see above: run-0"):
        run_trials(made, path)
    assert "no room for 8192" in capsys.readouterr().err
    assert [record["name"] for record in trials.read_trials(path)] == ["run-1"]


def test_a_run_that_stopped_itself_is_recorded_as_diverged(tmp_path, monkeypatch):
    config = preset("board", "adamw")
    output = dataclasses.replace(config.output, directory=str(tmp_path))
    config = dataclasses.replace(config, output=output)
    folder = RunFolder(config)

    def fit(config, *, overwrite, console):
        folder.checkpoints.mkdir(parents=True)
        settings = {"optimizer": "adamw", "schedule": {"steps": 60}}
        start = {"kind": "start", "config": settings}
        val = {"kind": "val", "step": 0, "loss": 4.0, "train_time_s": 0.0}
        train = {"kind": "train", "step": 10, "loss": None, "step_time_s": 0.1}
        end = {"kind": "diverged", "step": 15, "skipped": 10}
        lines = [json.dumps(record) for record in (start, val, train, end)]
        folder.metrics.write_text("\n".join(lines))
        raise DivergedError("diverged")

    monkeypatch.setattr(trials, "fit", fit)
    record = run_trial(Trial({}, config))
    assert (record["status"], record["loss"]) == ("diverged", None)
    assert (record["steps"], record["losses"]) == ([0, 60], [4.0, None])
