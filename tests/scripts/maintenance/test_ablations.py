"""Ablations: the tuning rule, seeds that pair, the page."""

import inspect
import json
import math
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import pytest

from nanogpt.lab.trials import read_trials
from nanogpt.optimizers.build import REGISTRY
from nanogpt.report.paired import paired
from scripts.maintenance.ablation_complete import recipe
from scripts.maintenance.ablation_page import write
from scripts.maintenance.ablation_points import (
    ABLATING,
    AGAIN,
    FAMILIES,
    JUDGING,
    NOTHING,
    TUNING,
    Run,
    loss,
    make_config,
    make_points,
)
from scripts.maintenance.ablations import main, settle, tune

MUON = Run("muon", 0.0, 0.0, 0)
POINTS = {point.name: point for point in make_points()}


def bowl(rate, auxiliary):
    """A loss with its best rates at these powers; every run is noted."""
    done = []

    def train(runs):
        done.extend(runs)
        return [
            3 + 0.1 * (r.rate - rate) ** 2 + 0.02 * (r.auxiliary - auxiliary) ** 2 for r in runs
        ]

    return done, train


def page(folder, runs):
    """The page of runs, each with a final loss and seconds of a step."""
    path = folder / "recipe" / "runs.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        for run, value, seconds in runs:
            record = {"settings": run._asdict(), "status": "finished", "loss": value}
            start = {"device": {"kind": "8 cores of a kind"}}
            file.write(json.dumps(record | {"step_time_s": seconds, "start": start}) + "\n")
    write(folder, path, POINTS)
    return (folder / "recipe.md").read_text()


def test_tuning_goes_beyond_an_edge_and_ends_at_the_parabolas_lowest_point():
    done, train = bowl(1.3, -0.2)
    assert tune(MUON, True, train) == (1.25, -0.25)  # eighths
    assert [r.rate for r in done[:4]] == [-1, 0, 1, 2] and len(done) == 7
    assert {r.seed for r in done} == {TUNING}
    done, train = bowl(9.0, 9.0)
    assert tune(MUON, True, train) == (3.0, 6.0)  # five and eight, and both are edges
    assert len(done) == 5 + 8


def test_a_change_starts_at_its_family_s_rates_unless_it_has_its_own():
    done, train = bowl(0.5, 0.0)
    assert settle(POINTS["rtol 0"], train) == (0.5, 0.0)
    assert [r.rate for r in done if r.point == "rtol 0"] == [-0.5, 0.5, 1.5]
    done, train = bowl(0.5, 0.0)
    settle(POINTS["hyperball"], train)
    assert [r.rate for r in done if r.point == "hyperball"] == [-1, 0, 1]


def test_another_board_tunes_one_rate_again_with_three_trials():
    done, train = bowl(3.0, -0.2)
    assert settle(POINTS["shampoo()"], train, "board_m") == (3.0, 0.0)
    assert [r.rate for r in done if r.board == "board_m"] == [2, 3, 4]
    ahead, tail = POINTS["EMA_Nesterov"], POINTS["muon + tail"]
    config = make_config(ahead, Run(ahead.name, 0.0, 0.0, 0, board="board_m"))
    assert (config.lookahead.start, config.lookahead.end) == (62, 404)
    config = make_config(tail, Run(tail.name, 0.0, 0.0, 0, board="board_m"))
    assert (config.tail.start, config.tail.tau, config.schedule.steps) == (496, 32.0, 600)


def test_runs_of_a_seed_share_weights_and_data():
    """Both follow from these settings alone."""
    configs = [
        make_config(p, Run(p.name, 0.0, 0.0, 7)) for p in POINTS.values() if p.name in FAMILIES
    ]
    shared = {(c.model, c.data, c.seed, c.schedule.steps) for c in configs}
    assert len(configs) == len(FAMILIES) and len(shared) == 1
    assert configs[0].data.seed == configs[0].seed == 7


def test_seeds_are_apart():
    seeds = [TUNING, *ABLATING, *JUDGING, *AGAIN, *range(300, 304)]  # the last had been seen
    assert len(seeds) == len(set(seeds))


def test_every_point_can_be_configured_and_changes_something():
    for point in POINTS.values():
        run = Run(point.name, 1.0, 1.0, 0)
        mine, family = (make_config(p, run) for p in (point, POINTS[point.family]))
        assert (mine == family) == (point.name == point.family or point.factor == NOTHING)


def test_the_recipe_of_the_guide_is_the_rig_s():
    config = make_config(POINTS["shampoo_next"], Run("shampoo_next", 0.0, 0.0, 0))
    mine, theirs = recipe(1.0), REGISTRY["shampoo_next"](config.matrices, None)
    params = {"w": jnp.zeros((6, 4)), "wide": jnp.zeros((4, 8))}
    states = mine.init(params), theirs.init(params)
    for step in range(3):
        gradients = {
            name: jax.random.normal(jax.random.key(step), x.shape) for name, x in params.items()
        }
        found, expected = (
            tx.update(gradients, state, params)
            for tx, state in zip((mine, theirs), states, strict=True)
        )
        descent = jax.tree.map(jnp.negative, found[0])
        chex.assert_trees_all_close(descent, expected[0], rtol=0, atol=3e-5)
        states = found[1], expected[1]
    _, lines = inspect.getsource(recipe).split('"""\n')
    assert lines in pathlib.Path("docs/howto/muon.md").read_text().replace(
        "  # inputs x outputs", ""
    )


def test_a_family_tuned_to_its_own_rates_twice_is_compared_with_itself(tmp_path):
    told = ("shampoo_next", 3.5), ("exponent 0.5", 3.51)
    runs = [(Run(name, 0.5, 0.0, seed), value, 1.0) for name, value in told for seed in ABLATING]
    text = page(tmp_path, runs)  # "nothing changed" is equal to the family, so it has no runs
    assert "| exponent | exponent 0.5 | shampoo_next | **+0.0100 ± 0.0000** | 3.5100 | 8 |" in text


def test_the_page_is_that_of_the_runs(tmp_path):
    """So are its figures; and the texts of all runs are the same."""
    docs = pathlib.Path("docs")
    (tmp_path / "recipe").mkdir()
    for name in ("runs.jsonl", "time.jsonl"):
        shutil.copy(docs / "recipe" / name, tmp_path / "recipe")
    write(tmp_path, tmp_path / "recipe" / "runs.jsonl", POINTS)
    assert (tmp_path / "recipe.md").read_text() == (docs / "recipe.md").read_text()
    records = read_trials(docs / "recipe" / "runs.jsonl")
    data = {(r["settings"]["corpus"], r["start"]["fingerprint"]["data"]) for r in records}
    assert len(data) == 3


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("--points nope", "--points: invalid choice: 'nope'"),
        ("--judge nope", "--judge: invalid choice: 'nope'"),
        ("--again", "--again and --board say how to --judge"),
        ("--seeds -1", "--seeds -1: from 0 to 8"),
        ("--seeds 9", "--seeds 9: from 0 to 8"),
        ("--judge board --again --seeds 25", "--seeds 25: from 0 to 24"),
        ("--judge board --trials 4", "--trials 4: 3 or more, with --board board_m"),
        ("--judge board --board board_m --trials 2", "--trials 2: 3 or more, with"),
        ("--jobs 0", "--jobs 0: at least 1"),
    ],
)
def test_what_the_command_cannot_do_is_told_at_once(monkeypatch, capsys, wrong, told):
    monkeypatch.setattr("sys.argv", ["ablations", *wrong.split()])
    with pytest.raises(SystemExit):
        main()
    assert told in capsys.readouterr().err


def test_the_page_tells_differences(tmp_path):
    same = "shampoo_next, nothing changed"
    losses = {"muon": 3.5, "shampoo_next": 3.49, same: 3.489, "rtol 0": 3.6}
    text = page(
        tmp_path,
        [
            (Run(name, 0.5, 0.0, seed), value + 0.004 * (seed % 2) * (name == "rtol 0"), 3.0)
            for name, value in losses.items()
            for seed in ABLATING[:4]
        ],
    )
    assert "| cutoff | rtol 0 | shampoo_next | **+0.1130 ± 0.0012** | 3.6020 | 4 |" in text
    assert "half of the differences show 0.0012" in text
    assert "(16 runs: tuning and ablations on S 16 runs in 4.0 hours" in text  # 300 of 3 s
    assert "| shampoo_next | 0.0424 | 1 | 3.4900 | **-0.0100 ± 0.0000** | 4 |" in text
    assert (tmp_path / "recipe" / "ablations.png").stat().st_size > 10_000


def test_the_page_takes_the_rates_that_were_taken_last(tmp_path):
    # More seeds had the earlier rate: what is left of it does not count.
    text = page(
        tmp_path,
        [
            (Run("muon", rate, 0.0, seed, board=board), value - (board == "board_m"), 1.0)
            for rate, value, n in ((1.0, 9.0, 3), (0.5, 3.5, 2))
            for seed in (*ABLATING[:n], *JUDGING[:n])
            for board in ("board", "board_m")
        ],
    )
    assert "| muon | 0.0566 | 1 | 3.5000 | - | 2 |" in text
    assert "| S | A | muon | 3.5000 | - | - | 2 |" in text
    assert "| M | A | muon | 2.5000 | - | - | 2 |" in text


def test_the_page_tells_what_each_board_can_see(tmp_path):
    losses = {"board": ("muon", "shampoo_next"), "prose": ("muon", "adamw")}
    text = page(
        tmp_path,
        [
            (Run(name, 0.5, 0.0, seed, corpus, "board_m"), 3 - 0.02 * place * (seed % 2), 1.0)
            for corpus, names in losses.items()
            for place, name in enumerate(names)
            for seed in JUDGING[:4]
        ],
    )
    assert "by the differences there: M 0.0115." in text  # .02 / 3**.5


def test_the_page_tells_rates_that_were_tried_on_m(tmp_path):
    tried = [(0.5, 3.2), (-0.5, 3.1), (1.5, 3.3)]
    runs = [
        (Run("muon", rate, 0.0, seed, board=board), value, 1.0)
        for rate, value in tried
        for seed, board in ((TUNING, "board_m"), (TUNING, "board"), (JUDGING[0], "board_m"))
    ]
    told = "| muon | 3.1000 at 0.0283, 3.2000 at 0.0566, 3.3000 at 0.113 |"
    assert told in page(tmp_path, runs)


def test_the_page_tells_what_a_gain_would_be_at_full_size(tmp_path):
    losses = {"muon": 3.5, "shampoo_next": 3.491}
    runs = [(Run(n, 0.5, 0.0, s), x, 1.0) for n, x in losses.items() for s in JUDGING]
    text = page(tmp_path, runs)
    # 0.009 of 0.0045 a hundred steps, without an error.
    assert "3.28 after 3050 to 3050 steps" in text
    assert "0.0090 ± 0.0000 below the better Muon. If as much as on S were" in text
    (tmp_path / "more").mkdir()
    text = page(
        tmp_path / "more", runs + [(r._replace(board="board_m"), x, 1.0) for r, x, _ in runs]
    )
    assert "below the better Muon, on M and A 0.0090 ± 0.0000. If as much as on S were" in text


def test_the_page_tells_seconds_of_whole_runs(tmp_path):
    seconds = {"adamw": (6.0, 6.5), "240 steps blocks": (5.5, 6.2)}
    (tmp_path / "recipe").mkdir()
    with (tmp_path / "recipe" / "time.jsonl").open("w") as file:
        for name, times in seconds.items():
            for turn, time in enumerate(times):
                record = {"kind": "time", "cores": 1, "point": name, "turn": turn, "seconds": time}
                file.write(json.dumps(record) + "\n")
    told = ("adamw", 3.6), ("shampoo_next", 3.5), ("240 steps blocks", 3.58)
    runs = [(Run(name, 0.5, 0.0, seed), value, 1.0) for name, value in told for seed in ABLATING]
    text = page(tmp_path, runs)
    assert "| seconds, 1 core | less AdamW's |" in text
    assert "| adamw | 300 | 3.6000 | - | 6.25 | - |" in text
    told_apart = "**-0.0200 ± 0.0000** | 5.85 | **-0.4000 ± 0.1000** |"
    assert f"| 240 steps blocks | 240 | 3.5800 | {told_apart}" in text
    assert "| shampoo_next | 300 | 3.5000 | **-0.1000 ± 0.0000** | - | - |" in text
    assert "| time |" not in text  # no change of the recipe, so in no other table


def test_complete_optimizers_have_tables_of_their_own(tmp_path):
    losses = {"muon": 3.4, "optax muon()": 3.6, "shampoo()": 3.55}
    seeds = (*ABLATING, *JUDGING[:2])
    text = page(tmp_path, [(Run(n, 0.0, 0.0, s), x, 1.0) for n, x in losses.items() for s in seeds])
    assert "| shampoo() | 0.008 | 3.5500 | **-0.0500 ± 0.0000** | 8 |" in text
    assert "| muon | 0.04 | 1 | 3.4000 | - | 8 |" in text
    assert "| S | A | shampoo() | 3.5500 | **-0.0500 ± 0.0000** | - | 2 |" in text
    assert "| S | A | muon | 3.4000 | - | - | 2 |\n\n| board" in text


def test_the_page_tells_whether_the_target_is_met(tmp_path):
    losses = {"muon": (3.5, 3.5), "shampoo_next": (3.49, 3.49), "muon_track3": (3.47, 3.535)}
    text = page(
        tmp_path,
        [
            (Run(name, 0.0, 0.0, seed, corpus), value[seed % 2], 1.0)
            for name, value in losses.items()
            for corpus, seeds in (("board", JUDGING), ("reference", (*JUDGING, *AGAIN)))
            for seed in seeds[: 2 if name == "muon" and corpus == "reference" else None]
        ],
    )
    assert "| S | A | shampoo_next less muon | ahead | **-0.0100 ± 0.0000** | 8 |" in text
    assert "| S | held out again | shampoo_next less muon_track3 | not told apart |" in text
    assert "| S | held out again | shampoo_next | 3.4900 | -0.0125 ± 0.0068 | - | 24 |" in text


def test_the_better_muon_is_that_of_the_same_seeds(tmp_path):
    first, second = JUDGING[:2]
    losses = {"muon": {first: 3.4, second: 3.6}, "muon_track3": {first: 3.45, JUDGING[2]: 3.1}}
    losses["shampoo_next"] = {first: 3.3, second: 3.5}
    runs = [(Run(n, 0.0, 0.0, s), x, 1.0) for n, of in losses.items() for s, x in of.items()]
    text = page(tmp_path, runs)
    assert "| S | A | shampoo_next less muon | ahead | **-0.1000 ± 0.0000** | 2 |" in text


def test_one_seed_judges_nothing(tmp_path):
    losses = {"muon": 3.5, "shampoo_next": 3.49}
    text = page(tmp_path, [(Run(n, 0.0, 0.0, JUDGING[0]), x, 1.0) for n, x in losses.items()])
    assert "| S | A | shampoo_next |" not in text and "± nan" not in text


def test_a_run_that_climbed_counts_as_chance():
    assert loss({"status": "diverged", "loss": None}) == pytest.approx(math.log(1024))


def test_a_pair_of_one_seed_has_no_error():
    found = paired({1: 2.0}, {1: 1.5, 2: 0.0})
    assert found.mean == 0.5 and math.isnan(found.error) and found.n == 1 and not found.told_apart
