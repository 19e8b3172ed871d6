"""The sweep: which trials it makes, what it keeps, what it records."""

import dataclasses
import signal

import numpy as np
import pytest

from data_pipeline import write_shard
from nanogpt.config.presets import preset
from nanogpt.config.run import LookaheadConfig, TailConfig
from nanogpt.config.settings import AdamWConfig
from nanogpt.lab import search, shared_programs, sweep
from nanogpt.lab.shared_programs import run_shared
from nanogpt.lab.trials import Trial, run_trials
from nanogpt.train.interrupt import Interrupted
from nanogpt.train.metrics import read_records

TINY = """
--model.vocab-size 32 --model.num-layers 1 --model.model-dim 16 --model.head-dim 8
--model.mlp-dim 32 --model.sequence-length 8 --data.val-tokens 64 --schedule.steps 3
--val-every 2 --output.log-every 1
""".split()
GRID = ["--grid", "matrices.learning_rate=x0.5,x1"]


def trials(*arguments: str):
    """The trials of a command line."""
    return sweep.make_trials(*search.read_sweep(arguments))


def test_every_optimizer_gets_its_own_rates():
    made = trials("--optimizers", "adamw", "muon", *GRID, "--schedule.steps", "7")
    assert [(t.config.optimizer, t.config.matrices.learning_rate) for t in made] == [
        ("adamw", 0.004), ("adamw", 0.008), ("muon", 0.02), ("muon", 0.04)
    ]  # fmt: skip
    assert {t.config.schedule.steps for t in made} == {7}
    assert made[0].settings == {"optimizer": "adamw", "matrices.learning_rate": 0.004}
    assert made[0].config.name == "sweep/adamw,matrices.learning_rate=0.004"


def test_any_setting_can_be_an_axis():
    grid = ["--grid", "seed=3,4", "--grid", "matrices.cutoff=positive"]
    ranges = ["--random", "matrices.b2=lin:0.8:0.9", "--runs", "4"]
    made = trials("--optimizers", "shampoo", *grid, *ranges)
    assert [t.config.seed for t in made] == [3, 4, 3, 4]
    assert len({t.config.matrices.b2 for t in made}) == 4
    assert all(0.8 <= t.config.matrices.b2 <= 0.9 for t in made)
    assert all(t.config.matrices.cutoff == "positive" for t in made)
    switch = ["--grid", "matrices.hyperball=True,False", "--matrices.weight-decay", "0"]
    made = trials("--optimizers", "adamw", *switch)
    assert [t.config.matrices.hyperball for t in made] == [True, False]
    made = trials("--optimizers", "soap", "--preset", "board", "--grid", "matrices.every=x1,x3")
    assert [t.config.matrices.every for t in made] == [5, 15]


def test_a_file_says_preset_and_optimizer_unless_flags_do(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("preset: board\noptimizer: soap\nmatrices: {every: 3}\n")
    (trial,) = trials("--config", str(path))
    assert (trial.config.optimizer, trial.config.matrices.every) == ("soap", 3)
    assert trial.config.model == preset("board", "soap").model
    path.write_text("optimizer: soap\nschedule: {steps: 7}\n")
    made = trials("--config", str(path), "--optimizers", "muon", "adamw", "--preset", "board")
    assert [trial.config.optimizer for trial in made] == ["muon", "adamw"]
    assert {trial.config.schedule.steps for trial in made} == {7}
    assert made[0].config.model == preset("board", "muon").model


def test_times_of_two_hosts_are_left_out():
    records = [
        {"settings": {"optimizer": "a"}, "loss": 3.0, "status": "finished", "step_time_s": 0.1}
        | {"start": {"host": host, "device": {"kind": "abacus"}}}
        for host in ("here", "here", "there")
    ]
    assert "| a | 3.0000 | 100 |" in sweep.table(records[:2])
    assert "| a | 3.0000 | - |" in sweep.table(records) and "100" not in sweep.table(records)


def record_of(loss, *, status="finished", fingerprint=None, end=None, **settings):
    """As `run_trial` gives it."""
    start = {"host": "here", "device": {}, "fingerprint": fingerprint}
    start["optimizer_state_bytes"] = 2_000_000
    found = {"settings": {"optimizer": "a"} | settings, "loss": loss, "status": status}
    return found | {"step_time_s": 0.1, "start": start, "end": end or {}}


def test_seeds_are_one_row_and_models_are_not_one_ranking():
    records = [
        *(record_of(3.0 + s / 10, rate=1, seed=s, end={"refreshed": 10 + s}) for s in (0, 1)),
        *(record_of(3.0, rate=2, seed=s, status=f) for s, f in enumerate(("diverged", "finished"))),
        record_of(2.0, rate=1, seed=0, fingerprint={"model": "wider"}),
    ]
    small, wide = sweep.table(records).split("different models or texts: not one ranking.")
    assert "validation loss | n | standard error | step time (ms) | optimizer state (MB)" in small
    assert "| a | 1 | 3.0500 | 2 | 0.0500 | 100 | 2.00 | 10 |" in small  # of 10 and 11
    assert "| a | 2 | diverged | 2 | - | 100 | 2.00 | - |" in small
    assert "| a | 1 | 0 | 2.0000 | 100 | 2.00 |" in wide and "refreshed" not in wide


def test_many_axes_have_names_that_fit():
    fields = ["learning_rate", "weight_decay", "b1", "b2", "eps"]
    axes = (
        [f"matrices.{name}" for name in fields]
        + [f"auxiliary.{n}" for n in ("b1", "b2", "eps")]
        + ["schedule.final"]
    )
    ranges = [word for name in axes for word in ("--random", f"{name}=log:1e-3:1e-1")]
    made = trials("--optimizers", "adamw", *ranges, "--runs", "2")
    names = [trial.config.name.partition("/")[2] for trial in made]
    assert len(set(names)) == 2 and all(len(name) <= 200 for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "seed"], "--grid seed: must be NAME=A,B"),
        (["--grid", "seed=1,1"], "different values"),
        (["--random", "seed=log:0:1", "--runs", "2"], "above 0 for log"),
        (["--random", "seed=log:1:2"], "say by --runs how many"),
        (["--grid", "seed=1", "--grid", "seed=2"], "seed is given 2 times"),
        (
            ["--grid", "matrices.learning-rate=x1", "--grid", "matrices.learning_rate=x2"],
            "matrices.learning_rate is given 2 times",
        ),
        (["--grid", "matrices.rate=x2"], "matrices.rate: is no setting of the optimizer 'adamw'"),
        (["--grid", "matrices.learnin-rate=x2"], "did you mean matrices.learning_rate?"),
        (["--random", "shedule.steps=lin:1:9", "--runs", "2"], "did you mean schedule.steps?"),
        (["--grid", "mesh=x2"], "mesh must be a number of the optimizer"),
        (["--grid", "matrices.learning_rate=-1"], "learning_rate=-1.0: must be positive"),
        (["--grid", "name=a,b"], "--grid name: decides no number"),
        (["--grid", "matrices.ns-steps=3"], "is no setting of the optimizer 'adamw'"),
        (["--grid", "matrices.b1=0.5,low"], "could not convert string to float: 'low'"),
        (["--optimizers", "sgd"], "optimizer='sgd' is unknown"),
        (["--optimizers"], "optimizers=(): a sweep needs at least one"),
        (["--jobs", "0"], "jobs=0: must be at least 1"),
        (["--runs", "0"], "runs=0: must be at least 1"),
    ],
)
def test_impossible_searches_are_refused(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "prepare_data", lambda config: pytest.fail("work was done"))
    with pytest.raises(SystemExit) as stopped:
        search.sweep(["--optimizers", "adamw", *arguments])
    assert message in f"{stopped.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(("flags", "run"), [([], None), (["--shared"], run_shared)])
def test_programs_are_shared_where_that_is_asked(flags, run, monkeypatch, tmp_path):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "prepare_data", lambda config: None)
    monkeypatch.setattr(sweep, "run_trials", lambda *_, jobs, run: asked.append((jobs, run)))
    monkeypatch.setattr(sweep, "table", lambda records: "")
    search.sweep(["--optimizers", "adamw", *GRID, *flags])
    assert asked == [(1, run)]


def test_a_signal_ends_it_with_its_code(monkeypatch, tmp_path, capsys):
    def stopped(*arguments, **keywords):
        raise Interrupted(signal.SIGTERM, 5, "runs/x")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "prepare_data", lambda config: None)
    monkeypatch.setattr(sweep, "run_trials", stopped)
    with pytest.raises(SystemExit) as ended:
        search.sweep(["--optimizers", "adamw", *GRID])
    assert ended.value.code == 128 + signal.SIGTERM
    assert "the same command goes on" in capsys.readouterr().err


@pytest.fixture
def tiny_data(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    tokens = np.arange(3000, dtype=np.uint16) % 32
    write_shard(folder / "t_train_000001.bin", tokens)
    write_shard(folder / "t_val_000000.bin", tokens[:200])
    return folder


def _share_a_program(trial, alone, path):
    """Another seed takes the same program, which has the numbers of the run; both are kept."""
    shared_programs._program.cache_clear()
    both = [trial, Trial({}, dataclasses.replace(trial.config, seed=1))]
    found, other = run_trials(both, path, run=shared_programs.run_shared)
    assert shared_programs._program.cache_info().misses == 1
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert {found["status"], other["status"]} == {"finished"}
    assert other["start"] == {name: alone["start"][name] for name in other["start"]}
    assert abs(other["loss"] - alone["loss"]) > 1e-4
    assert [x["loss"] for x in run_trials(both, path, run=pytest.fail)][1] == other["loss"]


def test_a_real_sweep_is_kept_and_widened(tiny_data, tmp_path, monkeypatch, capsys):
    """A first sweep here; then a rate more, which diverges, in a process of its own."""
    monkeypatch.chdir(tmp_path)
    common = ["--optimizers", "adamw", *TINY, "--data.directory", str(tiny_data)]
    search.sweep([*common, *GRID])
    path = tmp_path / "runs" / "sweep" / "trials.jsonl"
    first = path.read_text()
    records = read_records(path)
    rates = [record["start"]["config"]["matrices"]["learning_rate"] for record in records]
    assert rates == [0.004, 0.008]
    assert {record["status"] for record in records} == {"finished"}
    assert not list(tmp_path.rglob("checkpoints"))
    _share_a_program(trials(*common, *GRID)[1], records[1], tmp_path / "shared.jsonl")
    capsys.readouterr()
    path.write_text(first + '{"kind": "tri')  # a crash cut the next record short
    wider = ["--grid", "matrices.learning_rate=x1,x0.5,0.0080,1e30", "--jobs", "2"]
    search.sweep([*common, *wider])
    assert path.read_text().startswith(first)
    (added,) = read_records(path)[2:]
    assert (added["status"], added["loss"]) == ("diverged", None)
    printed = capsys.readouterr().out
    assert "trial 1 of 1" in printed and "| 1e+30 | diverged |" in printed
    assert printed.count("| adamw |") == 4
    # What is trained is shown by the axis of the sweep at hand, also where that is another one.
    search.sweep([*common, "--grid", "matrices.b1=0.9"])
    printed = capsys.readouterr().out
    assert "| optimizer | matrices.b1 |" in printed and "| adamw | 0.9 |" in printed


def test_a_shared_program_holds_norms_looks_ahead_and_averages(tiny_data, tmp_path, monkeypatch):
    """What its rate does not simply multiply; rates of the matrices and of the rest differ."""
    monkeypatch.chdir(tmp_path)
    (trial, *_) = trials("--optimizers", "adamw", *TINY, "--data.directory", str(tiny_data))
    config, steps = trial.config, trial.config.schedule.steps
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, init="record37"),
        matrices=AdamWConfig(0.05, 0.0, hyperball=True),
        auxiliary=dataclasses.replace(config.auxiliary, embed_learning_rate=0.1),
        lookahead=LookaheadConfig(0.5, start=1, end=steps),
        tail=TailConfig(start=1, tau=2.0, share=0.5),
    )
    (alone,) = run_trials([Trial({}, config)], tmp_path / "alone.jsonl")
    (found,) = run_trials([Trial({}, config)], tmp_path / "shared.jsonl", run=run_shared)
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert alone["losses"][-1] != pytest.approx(alone["losses"][0], rel=1e-4)
