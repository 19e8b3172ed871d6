"""The small board: the rule for the rates, what is trained, the page, and that nothing is lost."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest

from data_pipeline import write_shard
from nanogpt.config import presets
from nanogpt.config.presets import preset
from nanogpt.config.settings import MatrixConfig
from nanogpt.lab import board as leaderboard
from nanogpt.lab import search
from nanogpt.lab.board import FULL, QUICK, RATE, TUNING_SEED, Plan
from nanogpt.optimizers import build as optimizers
from nanogpt.optimizers.build import register
from nanogpt.optimizers.flops import step_flops
from nanogpt.report.groups import Group
from nanogpt.train.metrics import read_records

TINY = Plan("tiny", 4, (0,), 1, (0,), 4)


def outcome(trial, best_rate: float) -> dict:
    """Record of a run whose loss is a parabola over the logarithm of the rate."""
    away = math.log2(trial.settings[RATE] / best_rate)
    return {"status": "diverged" if away > 3 else "finished", "loss": 3 + away**2}


@pytest.mark.parametrize(
    ("best_power", "tried"),
    [(0, [-1, 0, 1]), (1, [-1, 0, 1, 2]), (3, [-1, 0, 1, 2, 3, 4]), (-2, [-3, -2, -1, 0, 1])],
)
def test_every_rate_is_bracketed_by_the_same_rule(best_power, tried):
    best_rate = {
        name: preset("board", name).matrices.learning_rate * 2.0**best_power
        for name in ("adamw", "soap_h")
    }
    trained = []

    def run(trials):
        trained.extend(trials)
        return [outcome(trial, best_rate[trial.settings["entry"]]) for trial in trials]

    tuned = leaderboard.tune(list(best_rate), FULL, run)
    assert {name: sorted(losses) for name, losses in tuned.items()} == dict.fromkeys(
        best_rate, tried
    )
    assert {leaderboard.best(losses) for losses in tuned.values()} == {best_power}
    assert {(t.config.seed, t.config.data.seed) for t in trained} == {(TUNING_SEED, TUNING_SEED)}


def test_the_budget_ends_a_search_at_the_edge():
    rate = preset("board", "adamw").matrices.learning_rate
    losses = leaderboard.tune(["adamw"], FULL, lambda ts: [outcome(t, 64 * rate) for t in ts])
    assert sorted(losses["adamw"]) == [-1, 0, 1, 2, 3, 4]
    assert "edge" in leaderboard.tuning_table(losses)


def test_diverged_runs_are_never_best():
    assert leaderboard.loss_of({"status": "diverged", "loss": 1.0}) == math.inf
    table = leaderboard.tuning_table({"lion": {-1: 3.5, 0: 3.25, 1: math.inf}})
    assert "| lion | 3 | 0.0005: 3.5000, **0.001: 3.2500**, 0.002: diverged |" in table


def test_final_seeds_are_new():
    for plan in (FULL, QUICK):
        assert TUNING_SEED not in plan.seeds
    trial = leaderboard.make_trial("muonh", FULL, "final", 2, seed=1)
    assert (trial.config.seed, trial.config.data.seed) == (1, 1)
    published = preset("board", "muonh")
    assert trial.config.matrices == dataclasses.replace(
        published.matrices, learning_rate=4 * published.matrices.learning_rate
    )
    assert trial.config.schedule == published.schedule


def made_up(name: str, seed: int, losses: list[float]) -> dict:
    """Record of a final run."""
    config = {
        "seed": seed, "optimizer": name, "model": dataclasses.asdict(preset("board", name).model),
        "data": dataclasses.asdict(preset("board", name).data), "schedule": {"steps": 100},
        "matrices": {"learning_rate": 0.125, "ns_steps": 5},
    }  # fmt: skip
    start = {
        "config": config, "versions": {"jax": "9"}, "device": {"kind": "abacus"}, "host": "here",
        "parameters": 7, "baselines": {"bigram": 3.75},
    }  # fmt: skip
    return {
        "name": name, "settings": {"entry": name}, "start": start, "end": {},
        "steps": [0, 50, 100], "losses": losses, "seconds": [0.0, 1.0, 2.0],
    }  # fmt: skip


def test_page_of_made_up_runs(tmp_path):
    finals = [
        made_up("adamw", 0, [6.0, 4.5, 4.0]), made_up("adamw", 1, [6.0, 4.5, 3.5]),
        made_up("muon", 0, [6.0, 4.0, 3.5]), made_up("muon", 1, [6.0, 4.0, 3.0]),
    ]  # fmt: skip
    timed = {"step_times_s": [9.0, 0.5, 0.25, 0.75], "start": finals[0]["start"]}
    groups = leaderboard.make_groups(["adamw", "muon"], [timed, timed], finals)
    assert [group.label for group in groups] == ["muon", "adamw"]
    muon_flops = step_flops(finals[2]["start"]["config"])
    assert groups[0].runs[0].seconds == [0.0, 12.5, 25.0]
    page = leaderboard.write_board(tmp_path, groups, {"muon": {0: 1.0}}, 80)
    muon = next(line for line in page.splitlines() if line.startswith("| muon | 2"))
    # Mean 3.25; AdamW's 3.75 lies a third of the way from 4.0 at 50 to 3.25 at 100.
    cells = [cell.strip() for cell in muon.split("|")[1:-1]]
    flops = f"{muon_flops * 1e-12:.4g}"
    assert cells == ["muon", "2", "100", "3.2500", "0.3536", "67", "250", flops, "0.125"]
    # Both std are sqrt(2 * .25^2); a difference of means of two has that error, too.
    assert "the std is 0.3536, so a difference of two means has a standard error of 0.3536" in (
        page.replace("\n", " ")
    )
    assert "bigram model has a loss of 3.750" in page and "abacus" in page
    assert (tmp_path / "board.png").stat().st_size > 10_000
    assert (tmp_path / "board.md").read_text() == page


def test_diverged_runs_have_a_row(tmp_path):
    nan = made_up("lion", 0, [6.0, None, None])
    timed = {"step_times_s": [1.0, 1.0], "start": nan["start"]}
    (group,) = leaderboard.make_groups(["lion"], [timed], [nan])
    assert isinstance(group, Group) and math.isnan(group.result.mean)
    page = leaderboard.write_board(tmp_path, [group], {"lion": {}}, 60)
    assert "| lion | 1 | 100 | nan |" in page


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are no matter here."""
    monkeypatch.setattr(leaderboard, "draw_board", lambda *_, **__: None)


def test_a_board_that_moved_to_another_host_has_no_times(tmp_path, undrawn):
    """Its losses stay: they mean the same on every machine."""
    finals = [made_up("muon", 0, [6.0, 4.5, 4.0]), made_up("adamw", 0, [6.0, 4.5, 4.25])]
    timed = [
        {"step_times_s": [1.0, 1.0], "start": finals[0]["start"] | {"host": host}}
        for host in ("here", "there")
    ]
    groups = leaderboard.make_groups(["muon", "adamw"], timed, finals)
    assert all(math.isnan(group.seconds_per_step) for group in groups)
    page = leaderboard.write_board(tmp_path, groups, {"muon": {}}, 60)
    assert "| muon | 1 | 100 | 4.0000 | - | 75 | - |" in page


def test_a_page_says_tuned_or_untuned_and_not_both(tmp_path, undrawn):
    run = made_up("muon", 0, [6.0, 4.5, 4.0])
    timed = {"step_times_s": [1.0, 1.0], "start": run["start"]}
    (group,) = leaderboard.make_groups(["muon"], [timed], [run])

    def said(tuned, timed):
        page = leaderboard.write_board(tmp_path, [group], tuned, timed)
        return " ".join(page.split())

    quick, full = said({"muon": {}}, 60), said({"muon": {0: 4.0}}, 80)
    assert "Nothing was tuned" in quick and "over 15 steps" in quick
    assert "Only the rate" not in quick and "the best" not in quick
    assert "Only the rate of the matrices was tuned" in full and "over 20 steps" in full
    assert "Nothing" not in full and "100 steps say little" in full


@pytest.fixture
def tiny_preset(tmp_path, monkeypatch):
    """Preset "board" at 16 wide, on a small text of its own; runs share their programs."""
    tokens = np.arange(3000, dtype=np.uint16) % 32
    write_shard(tmp_path / "t_train_000001.bin", tokens)
    write_shard(tmp_path / "t_val_000000.bin", tokens[:200])

    def tiny(name, entry):
        config = preset(name, entry)
        sizes = {"vocab_size": 32, "num_layers": 1, "model_dim": 16, "head_dim": 8, "mlp_dim": 32}
        model = dataclasses.replace(config.model, **sizes, sequence_length=8)
        data = dataclasses.replace(config.data, directory=str(tmp_path), val_tokens=64)
        return dataclasses.replace(config, model=model, data=data)

    monkeypatch.setattr(leaderboard, "preset", tiny)
    monkeypatch.setattr(leaderboard, "prepare_data", lambda config: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_stopped_board_goes_on(tiny_preset, capsys):
    folder = tiny_preset / "runs" / "tiny"
    page = leaderboard.run_board(["adamw", "lion"], TINY, jobs=1)
    records = read_records(folder / "board.jsonl")
    roles = [record["settings"]["role"] for record in records]
    assert roles == 2 * ["tune"] + 2 * ["final"] + 2 * ["time"]
    assert [len(record["step_times_s"]) for record in records[-2:]] == [4, 4]
    whole = (folder / "board.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    (folder / "board.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    capsys.readouterr()
    leaderboard.run_board(["adamw", "lion"], TINY, jobs=1)
    assert "trial 1 of 1, tiny/lion/final" in capsys.readouterr().out
    again = read_records(folder / "board.jsonl")
    assert [(r["name"], r["loss"]) for r in again] == [(r["name"], r["loss"]) for r in records]
    assert "| adamw | 1 | 4 |" in page and "| lion | 1 | **0.001: " in page


def test_an_optimizer_of_ones_own_has_a_row(tiny_preset, monkeypatch, capsys):
    """Named twice, it is trained once; times are the CPU's, where no variable says otherwise."""
    monkeypatch.setattr(optimizers, "REGISTRY", dict(optimizers.REGISTRY))
    monkeypatch.setattr(presets, "OWN", {})
    register("own", lambda settings, _: optax.scale_by_sign(), MatrixConfig(0.002, 0.1))
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.delenv("JAX_PLATFORMS")
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    try:
        search.board(["--quick", "--entries", "own", "own", "--jobs", "1"])
        assert jax.config.jax_platforms == "cpu"
    finally:
        jax.config.update("jax_platforms", before)
    printed = capsys.readouterr().out
    assert "| own | 1 | 60 |" in printed and printed.count("| own |") == 1
    with pytest.raises(SystemExit, match="error: optimizer='nobody' is unknown"):
        search.board(["--quick", "--entries", "own", "nobody"])
