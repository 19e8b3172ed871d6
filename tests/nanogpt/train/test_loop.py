"""The loop: what it records, and that a run cut anywhere ends as if it had never been cut."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import rich.console

from data_pipeline import ShardError, write_shard
from nanogpt.config.run import (
    AuxiliaryConfig,
    Config,
    DataConfig,
    ModelConfig,
    OutputConfig,
    ScheduleConfig,
)
from nanogpt.config.settings import AdamWConfig, ShampooConfig
from nanogpt.optimizers.build import REGISTRY
from nanogpt.optimizers.directions import adam, count_refreshes
from nanogpt.train import loop
from nanogpt.train import progress as report
from nanogpt.train.interrupt import Interrupted, StopSignal
from nanogpt.train.loop import fit, validation_due
from nanogpt.train.metrics import read_records
from nanogpt.train.nonfinite import DivergedError
from nanogpt.train.run_folder import RunFolder

VOCAB, STEPS = 32, 10


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of shards with some structure to learn: each token tends to follow its half."""
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)
    for name, count in (("train_000001", 3000), ("val_000000", 600)):
        tokens = np.cumsum(random.integers(0, 3, count)) % VOCAB
        write_shard(folder / f"text_{name}.bin", tokens.astype(np.uint16))
    return folder


def tiny(shards, directory, name="run", optimizer="adamw", **changes) -> Config:
    matrices = {
        "adamw": AdamWConfig(0.01, weight_decay=0.1),
        "shampoo": ShampooConfig(0.01, weight_decay=0.1),
    }
    config = Config(
        name=name,
        seed=3,
        model=ModelConfig(VOCAB, 1, 16, 8, 32, 8, dtype="float32"),  # bfloat16 embedding
        data=DataConfig(str(shards), "shuffled", 4, 2, val_tokens=128),
        schedule=ScheduleConfig(STEPS),
        optimizer=optimizer,
        matrices=matrices[optimizer],
        auxiliary=AuxiliaryConfig(0.1, 0.01, 0.01),
        output=OutputConfig(str(directory), log_every=1),
        val_every=4,
        val_every_final=1,
    )
    return dataclasses.replace(config, **changes)


def records(config: Config, kind: str | None = None) -> list[dict]:
    path = os.path.join(config.output.directory, config.name, "metrics.jsonl")
    with open(path, encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    return [record for record in found if kind in (None, record["kind"])]


def losses(config: Config) -> list[tuple]:
    """Everything measured that does not depend on the clock."""
    return [
        (record["kind"], record["step"], record["loss"], record.get("grad_norm"))
        for record in records(config)
        if record["kind"] in ("train", "val", "end")
    ]


def saved(config: Config, step: int = STEPS) -> dict:
    """State and data position of a checkpoint, as NumPy arrays."""
    folder = os.path.join(config.output.directory, config.name, "checkpoints", str(step))
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(os.path.join(folder, "state"))
    with open(os.path.join(folder, "data", "process_0-of-1.json"), encoding="utf-8") as file:
        return {"state": jax.tree.map(np.asarray, state), "data": json.load(file)}


def assert_equal(left: dict, right: dict) -> None:
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert jax.tree.structure(left) == jax.tree.structure(right)


def interrupt_after(monkeypatch, batches: int, signum: int, rows: int = 4) -> None:
    """Sends this process a signal while the loop fetches batch number `batches` of `rows` rows.

    Training batches have 4 rows; validation batches have 2, and one validation is 8 of them.
    """
    fetched = iter(range(1, 10**6))
    to_device = loop.to_device

    def with_signal(batch, layout):
        if batch["inputs"].shape[0] == rows and next(fetched) == batches:
            os.kill(os.getpid(), signum)
        return to_device(batch, layout)

    monkeypatch.setattr(loop, "to_device", with_signal)


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """A run that nothing disturbs, of which every checkpoint is kept."""
    output = OutputConfig(
        str(tmp_path_factory.mktemp("whole")), log_every=1, checkpoint_every=3, keep_checkpoints=9
    )
    config = tiny(shards, "", output=output)
    fit(config)
    return config


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (10, [0, 4, 8, 9, 10]),
        (3250, [*range(0, 2925, 125), *range(2925, 3250, 25), 3250]),
        (2720, [*range(0, 2448, 125), *range(2450, 2720, 25), 2720]),
    ],
)
def test_validation_follows_the_benchmarks_schedule(steps, expected):
    every, final = (4, 1) if steps == 10 else (125, 25)
    config = tiny("", "", schedule=ScheduleConfig(steps), val_every=every, val_every_final=final)
    assert [s for s in range(steps + 1) if validation_due(s, config)] == expected


def test_first_record_tells_what_the_run_is(whole):
    start = records(whole)[0]
    assert start["kind"] == "start"
    assert start["fingerprint"]["model"] == "GPT 1x16x8x32, 32 ids, rows of 8"
    assert start["fingerprint"]["tokenizer"] is None  # no manifest tells it
    assert start["host"] and start["argv"] and start["started"].endswith("+00:00")
    assert start["config"] == json.loads(json.dumps(dataclasses.asdict(whole)))
    assert start["versions"]["jax"] == jax.__version__
    assert start["device"]["platform"] == "cpu"
    assert set(start) > {"git_commit", "git_dirty", "baselines"}
    # Embedding and head; q, k, v, proj, fc, proj with biases; four norms.
    weights = 2 * VOCAB * 16 + VOCAB + 4 * (16 * 16 + 16) + 2 * 16 * 32 + 32 + 16 + 4 * 16
    assert start["parameters"] == weights
    # Two moments a parameter, the embedding's in bfloat16, and some counters.
    moments = 2 * (4 * weights - 2 * VOCAB * 16)
    assert moments <= start["optimizer_state_bytes"] <= moments + 64


def test_losses_of_every_due_step_are_recorded(whole):
    assert [record["step"] for record in records(whole, "train")] == list(range(STEPS))
    steps = [record["step"] for record in records(whole)[1:]]
    assert steps == sorted(steps)  # a step is settled, and its time taken, before a validation
    last = records(whole, "train")[-1]
    assert last["eta_s"] == 0 and last["mfu"] is None and 1e7 < last["peak_memory_bytes"] < 1e11
    rates = [record["learning_rate"] for record in records(whole, "train")]
    assert rates[:4] == pytest.approx([0.01] * 4) and rates[-1] == pytest.approx(0.01 / 7)
    validations = records(whole, "val")
    assert [record["step"] for record in validations] == [0, 4, 8, 9, 10]
    assert validations[0]["loss"] == pytest.approx(math.log(VOCAB), abs=1e-6)  # the head is zero
    assert validations[-1]["loss"] < validations[0]["loss"] - 0.1
    seconds = [record["train_time_s"] for record in validations]
    assert seconds == sorted(seconds) and seconds[0] == 0.0 < seconds[1]


def test_last_record_sums_the_run_up(whole):
    end = records(whole)[-1]
    assert end["kind"] == "end"
    assert end["loss"] == records(whole, "val")[-1]["loss"]
    assert end["train_time_s"] == records(whole, "val")[-1]["train_time_s"]
    assert end["tokens_per_s"] == pytest.approx(4 * 8 / end["median_step_time_s"])
    assert end["compile_s"] > 0
    assert 1e7 < end["peak_memory_bytes"] < 1e11


@pytest.mark.parametrize(
    ("rows", "batches", "signum", "step", "validated"),
    [
        (4, 5, signal.SIGINT, 5, [0, 4]),
        (2, 2 * 8 + 2, signal.SIGTERM, 8, [0, 4]),  # in the third validation
        (2, 4 * 8 + 2, signal.SIGINT, 10, [0, 4, 8, 9]),  # in the last one
    ],
)
def test_interrupted_run_goes_on_bit_for_bit(
    shards, tmp_path, whole, monkeypatch, rows, batches, signum, step, validated
):
    config = tiny(shards, tmp_path)
    with monkeypatch.context() as patch:
        interrupt_after(patch, batches, signum, rows)
        with pytest.raises(Interrupted, match=f"after {step} steps.*--resume") as stopped:
            fit(config)
    assert (stopped.value.signum, stopped.value.step) == (signum, step)
    assert [record["step"] for record in records(config, "train")] == list(range(step))
    assert [record["step"] for record in records(config, "val")] == validated
    fit(config, resume=True)
    assert losses(config) == losses(whole)
    assert_equal(saved(config), saved(whole))
    assert saved(config)["data"] == {"next_index": STEPS}
    assert [record["step"] for record in records(config, "resume")] == [step]
    path = os.path.join(config.output.directory, config.name, "record.txt")
    with open(path, encoding="utf-8") as file:
        log = re.findall(r"^step:(\d+)/10 val_loss:(\S+) train_time:(\S+)s", file.read(), re.M)
    assert log == [
        (str(record["step"]), f"{record['loss']:.5f}", f"{record['train_time_s']:.3f}")
        for record in records(config, "val")
    ]


def test_shampoo_goes_on_bit_for_bit(shards, tmp_path, monkeypatch):
    """And with the programs that it began with, which the cache of compilations then holds."""
    programs, compiled = [], loop._compiled

    def compile(function, *arguments):
        programs.append(function.lower(*arguments).as_text())
        return compiled(function, *arguments)

    monkeypatch.setattr(loop, "_compiled", compile)
    straight = tiny(shards, tmp_path, "straight", "shampoo")
    fit(straight)
    cut = tiny(shards, tmp_path, "cut", "shampoo")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4, signal.SIGINT)
        with pytest.raises(Interrupted):
            fit(cut)
    fit(cut, resume=True)
    assert losses(cut) == losses(straight)
    assert_equal(saved(cut), saved(straight))
    assert programs[:2] == programs[2:4] == programs[4:]


def test_killed_run_goes_on_from_its_last_checkpoint(shards, tmp_path, whole):
    """What kill -9 leaves: records behind the checkpoint, the last one cut short."""
    config = tiny(
        shards, tmp_path, output=dataclasses.replace(whole.output, directory=str(tmp_path))
    )
    source, target = (os.path.join(c.output.directory, c.name) for c in (whole, config))
    os.makedirs(os.path.join(target, "checkpoints"))
    os.system(f"cp -r {source}/checkpoints/6 {target}/checkpoints/6")
    kept = [json.dumps(record) for record in records(whole) if record.get("step", 0) < 9]
    with open(os.path.join(target, "metrics.jsonl"), "w", encoding="utf-8") as file:
        file.write("\n".join(kept) + '\n{"kind": "train", "st')
    fit(config, resume=True)
    assert losses(config) == losses(whole)
    assert_equal(saved(config), saved(whole))
    assert_equal(saved(config, 9), saved(whole, 9))


def test_a_damaged_checkpoint_is_passed_over_bit_for_bit(shards, tmp_path, whole):
    """The run goes on from the one before, says so, and makes the damaged one anew."""
    config = dataclasses.replace(
        whole, output=dataclasses.replace(whole.output, directory=str(tmp_path))
    )
    shutil.copytree(RunFolder(whole).path, RunFolder(config).path)
    folder = RunFolder(config)
    shutil.rmtree(folder.checkpoints / "10")
    tensors = next((folder.checkpoints / "9" / "state" / "d").iterdir())
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    before = records(config)
    with pytest.raises(ValueError, match="9 is damaged: state/d/.*--resume=previous-good goes"):
        fit(config, resume=True)
    assert records(config) == before
    said = io.StringIO()
    fit(config, resume="previous-good", console=rich.console.Console(file=said, soft_wrap=True))
    assert "run: passed over, and moved to damaged/: checkpoint" in said.getvalue()
    assert losses(config) == losses(whole)
    assert_equal(saved(config), saved(whole))
    assert_equal(saved(config, 9), saved(whole, 9))
    (resumed,) = records(config, "resume")
    assert resumed["step"] == 6 and "9 is damaged: state/d/" in resumed["damaged"][0]
    assert (folder.path / "damaged" / "9").is_dir()
    fit(config, resume=True)


@pytest.mark.parametrize(
    ("output", "steps"),
    [
        ({"checkpoint_minutes": 1.0}, [3, 6, 9, 10]),
        ({"checkpoint_minutes": 1.0, "checkpoint_every": 5}, [3, 5, 8, 10]),
        ({"keep_best": 1}, [4, 8, 9, 10]),
    ],
)
def test_when_checkpoints_are_made(shards, tmp_path, monkeypatch, output, steps):
    """A step takes 25 seconds here; validations are before updates 0, 4, 8, 9 and 10."""
    taken = iter(range(10**6))
    monkeypatch.setattr(loop, "_seconds", lambda: 25.0 * next(taken))
    config = tiny(shards, tmp_path, output=OutputConfig(str(tmp_path), **output))
    fit(config)
    told = records(config, "save")
    assert [record["step"] for record in told] == steps
    assert all(0 < record["save_blocked_s"] < 60 for record in told)


def test_checkpoints_of_a_running_loop_hold_their_own_step(whole):
    """Saves are asynchronous, and the state saved is donated to the next step."""
    assert [saved(whole, step)["state"]["step"] for step in (3, 6, 9, 10)] == [3, 6, 9, 10]
    assert saved(whole, 6)["data"] == {"next_index": 6}


def test_nothing_is_compiled_during_the_loop(shards, tmp_path, monkeypatch):
    compiled = []
    counting = False
    start = report.Report.start

    def start_counting(self, *args):
        nonlocal counting
        start(self, *args)
        counting = True

    def listen(event, duration, **_):
        if counting and "compile" in event:
            compiled.append(event)

    monkeypatch.setattr(report.Report, "start", start_counting)
    jax.monitoring.register_event_duration_secs_listener(listen)
    fit(tiny(shards, tmp_path))
    assert compiled == []
    jax.jit(lambda x: x + 1)(3)  # the listener does hear compilations
    assert compiled
    counting = False


def test_finished_run_is_left_alone(whole):
    before = records(whole)
    assert fit(whole, resume=True) == before[-1]
    assert records(whole) == before


def test_finished_run_whose_checkpoints_were_deleted_is_left_alone(shards, tmp_path):
    """They are large, and --seeds 8 --resume goes through the runs that there are."""
    config = tiny(shards, tmp_path, schedule=ScheduleConfig(2))
    fit(config)
    before = records(config)
    shutil.rmtree(RunFolder(config).checkpoints)
    assert fit(config, resume=True) == before[-1]
    with pytest.raises(ValueError, match="with seed=3, this run has seed=1"):
        fit(dataclasses.replace(config, seed=1), resume=True)
    assert records(config) == before


def test_records_without_a_checkpoint_are_not_replaced_by_another_run(shards, tmp_path, whole):
    """What is left of a run that was killed before its first checkpoint."""
    config = tiny(shards, tmp_path)
    folder = RunFolder(config)
    folder.path.mkdir(parents=True)
    before = "".join(json.dumps(record) + "\n" for record in records(whole)[:5])
    folder.metrics.write_text(before)
    with pytest.raises(ValueError, match="optimizer='adamw' trained it, this run has .*'shampoo'"):
        fit(tiny(shards, tmp_path, optimizer="shampoo"), resume=True)
    with pytest.raises(ValueError, match="with seed=3, this run has seed=1"):
        fit(dataclasses.replace(config, seed=1), resume=True)
    for name in ("train_000001", "val_000000"):
        write_shard(tmp_path / f"text_{name}.bin", np.arange(700, dtype=np.uint16) % VOCAB)
    other = dataclasses.replace(config.data, directory=str(tmp_path))
    with pytest.raises(ValueError, match="are not those of the saved run"):
        fit(dataclasses.replace(config, data=other), resume=True)
    assert folder.metrics.read_text() == before
    fit(config, resume=True)
    assert losses(config) == losses(whole)


def test_a_run_stopped_while_it_compiles_costs_no_other_one(shards, tmp_path, monkeypatch):
    config = tiny(shards, tmp_path, schedule=ScheduleConfig(1))
    fit(config)
    before, compile = records(config), loop._Run.compile

    def interrupted(self):
        compile(self)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop._Run, "compile", interrupted)
    with pytest.raises(StopSignal) as stopped:
        fit(config, overwrite=True)
    assert stopped.value.code == 128 + signal.SIGTERM and records(config) == before


@pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}])
def test_a_run_that_another_process_is_at_is_left_alone(whole, how):
    before, other = records(whole), RunFolder(whole)
    other.lock()
    with contextlib.closing(other), pytest.raises(ValueError, match="another process is training"):
        fit(whole, **how)
    assert records(whole) == before


def test_existing_run_is_not_overwritten(whole):
    before = records(whole)
    with pytest.raises(FileExistsError, match="--resume.*--overwrite.*--name"):
        fit(whole)
    assert records(whole) == before


@pytest.mark.parametrize("possible", [False, True])
def test_an_overwritten_run_goes_when_the_new_one_is_compiled(shards, tmp_path, possible):
    config = tiny(shards, tmp_path, schedule=ScheduleConfig(2))
    fit(config)
    before = records(config)
    again = dataclasses.replace(config, optimizer="adamw" if possible else "shampoo", seed=4)
    if possible:
        fit(again, overwrite=True)
        assert records(again)[0]["config"]["seed"] == 4
        assert saved(again, 2)["state"]["step"] == 2
    else:
        with pytest.raises(ValueError, match="shampoo"):
            fit(again, overwrite=True)
        assert records(config) == before
        assert fit(config, resume=True) == before[-1]


def test_resume_names_the_setting_that_differs(whole):
    changed = dataclasses.replace(whole, schedule=ScheduleConfig(STEPS, cooldown=0.5))
    with pytest.raises(ValueError, match=r"schedule\.cooldown=0\.7, this run has .*=0\.5"):
        fit(changed, resume=True)


def test_a_run_goes_on_with_other_microbatches(shards, tmp_path, whole, monkeypatch):
    """As on another number of devices that have a row each; sums come in another order."""
    config = tiny(shards, tmp_path)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4, signal.SIGINT)
        with pytest.raises(Interrupted):
            fit(config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, microbatch_rows=4))
    fit(config, resume=True)
    (one, other) = ([x["loss"] for x in records(run, "train")] for run in (config, whole))
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert one != other  # or nothing was cut otherwise


def test_a_run_whose_statistics_are_of_microbatches_keeps_them(shards, tmp_path):
    statistics = ShampooConfig(0.01, weight_decay=0.1, statistics="microbatches")
    config = tiny(shards, tmp_path, optimizer="shampoo", matrices=statistics)
    config = dataclasses.replace(config, schedule=ScheduleConfig(1))
    fit(config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, microbatch_rows=1))
    with pytest.raises(ValueError, match=r"data\.microbatch_rows=2, this run has .*=1"):
        fit(config, resume=True)


def test_resume_refuses_other_data(whole, tmp_path):
    random = np.random.default_rng(1)
    for name in ("train_000001", "val_000000"):
        write_shard(tmp_path / f"text_{name}.bin", random.integers(0, VOCAB, 700).astype(np.uint16))
    changed = tiny(tmp_path, "", output=whole.output)
    with pytest.raises(ValueError, match=r"data\.directory=.*are not those of the saved run"):
        fit(changed, resume=True)


def test_too_few_tokens_are_refused_before_anything_is_written(shards, tmp_path):
    config = tiny(shards, tmp_path / "runs", schedule=ScheduleConfig(1000))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mode="sequential"))
    with pytest.raises(ShardError, match="1000 steps"):
        fit(config)
    assert not (tmp_path / "runs").exists()


def poison(monkeypatch, bad):
    """Makes the gradients of some steps infinite, before the run's own guard."""
    made = loop.make_train_step

    def make(graphdef, tx, *rest):
        def update(updates, state, params, **extra):
            adam = state.inner_state.inner_states["head"].inner_state[0]
            step = adam.count + state.total_notfinite
            wrong = jax.numpy.isin(step, jax.numpy.array(bad))
            updates = jax.tree.map(lambda g: jax.numpy.where(wrong, jax.numpy.inf, g), updates)
            return tx.update(updates, state, params, **extra)

        return made(graphdef, optax.GradientTransformationExtraArgs(tx.init, update), *rest)

    monkeypatch.setattr(loop, "make_train_step", make)


def test_skipped_steps_are_counted_and_shown(shards, tmp_path, monkeypatch):
    poison(monkeypatch, [2, 5])
    config = tiny(shards, tmp_path, nonfinite_limit=2)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4 * 8 + 2, signal.SIGINT, rows=2)  # in the last validation
        with pytest.raises(Interrupted):
            fit(config)
    end = fit(config, resume=True)
    assert end["kind"] == "end" and end["skipped"] == 2


def test_spectra_are_of_steps_whose_figures_are_kept():
    """The monitor counts updates: records stay beside it where steps are skipped."""
    bad, found = (0, 5, 8), []  # the others are the updates 1 to 8
    run = SimpleNamespace(
        config=SimpleNamespace(matrices=SimpleNamespace(monitor=3)),
        skipped=0, state=None, read_spectra=lambda state: {}, clock=SimpleNamespace(start=int),
    )  # fmt: skip
    report = SimpleNamespace(spectra=lambda step, matrices: found.append(step))
    for step in range(11):
        skipped = sum(b <= step for b in bad)
        run._settle = lambda report, now=skipped: vars(run).update(skipped=now)
        loop._Run._record_spectra_if_due(run, step, report)
        run.skipped = skipped  # settled behind the next step
    assert found == [1, 3, 7]


def test_too_many_in_a_row_end_the_run(shards, tmp_path, monkeypatch):
    poison(monkeypatch, [2, 5, 6, 7])
    config = tiny(shards, tmp_path, nonfinite_limit=3)
    with pytest.raises(DivergedError, match="the gradients of steps 5 to 7 are not finite"):
        fit(config)
    last = read_records(RunFolder(config).metrics)[-1]
    assert (last["kind"], last["step"], last["skipped"]) == ("diverged", 7, 4)


class Turning(NamedTuple):
    """State of a direction with two bases, of which each step turns one."""

    bases: Any


def turning(settings, placement):
    def update(updates, state, params=None):
        first, second = state.bases
        return updates, Turning((first + 1, second))

    init = lambda params: Turning((jnp.zeros((1, 2, 2)), jnp.ones((1, 3, 3))))  # noqa: E731
    bases = count_refreshes(optax.GradientTransformation(init, update))
    return optax.chain(adam(settings, placement), bases)


def test_a_trace_of_a_few_steps_and_bases_that_are_counted(shards, tmp_path, monkeypatch):
    config = tiny(shards, tmp_path, schedule=ScheduleConfig(6), profile=True)
    fit(config)
    traces = list((RunFolder(config).path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 0
    short = tiny(shards, tmp_path, "short", schedule=ScheduleConfig(3), profile=True)
    monkeypatch.setitem(REGISTRY, "adamw", turning)
    assert fit(short)["refreshed"] == 3
    assert [record["refreshed"] for record in records(short, "train")] == [1, 2, 3]
    assert not any("refreshed" in record for record in records(config))
    assert list((RunFolder(short).path / "profile").rglob("*.xplane.pb"))


def test_it_says_at_once_that_it_compiles(shards, tmp_path, monkeypatch):
    said = io.StringIO()

    def compile(*_):
        assert said.getvalue() == "run: compiling ...\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "init_state", compile)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny(shards, tmp_path), console=rich.console.Console(file=said))
