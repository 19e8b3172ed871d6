"""Optima by width: vertices, what is trained, the page."""

import json
import math

import pytest

from nanogpt.lab import trials
from nanogpt.optimizers.transfer import RATES
from scripts.maintenance import transfer_page
from scripts.maintenance.transfer_optima import Cell, cells, optimum, read_losses, vertex
from scripts.maintenance.transfer_sweep import make_config, tune


def test_the_vertex_is_that_of_a_parabola():
    losses = {p: 3.0 + 0.1 * (p - 1.3) ** 2 for p in range(-2, 4)}
    assert vertex(losses) == pytest.approx(1.3)
    assert math.isnan(vertex({0: 1.0, 1: 2.0, 2: 3.0}))
    assert vertex({0: 1.0, 1: 1.0, 2: 1.0, -1: 1.0}) == 0
    seeds = {p: [0.1 * (p - m) ** 2 for m in (1.0, 1.4)] for p in range(-2, 4)}
    assert optimum(seeds) == pytest.approx((1.2, 1.0, 1.4))


def test_a_factor_is_of_all_rates_and_the_base_knows_no_rules():
    one, four = (make_config(Cell("muon", 64, True), p, 0) for p in (0, 2))
    for settings, more in ((one.matrices, four.matrices), (one.auxiliary, four.auxiliary)):
        for name in set(RATES) & set(vars(settings)):
            assert getattr(more, name) == 4 * getattr(settings, name)
    assert one.model.transfer and one.model.scaled().model_dim == 64
    assert one.model.scaled().mlp_dim == 128
    without, rules, alone = cells(["muon"])
    assert without[0] == rules[0] and not any(c.rules for c in without)
    own = make_config(alone[1], 2, 0, others=0)
    assert own.matrices == four.matrices and own.auxiliary == one.auxiliary


def test_rates_are_added_until_the_best_is_inside(tmp_path, monkeypatch, capsys):
    """Optima fall by a factor 2 with every width without the rules, and stay with them."""
    trained = []

    def run(made, path, *, run):
        del run
        found = []
        with path.open("a") as file:
            for settings, config in made:
                narrower = 0 if settings["rules"] else math.log2(settings["width"] / 32)
                alone = "others" in settings
                narrower += alone - alone * 0.1 * (settings.get("others", 0) == 6)  # the best
                loss = 3 + 0.1 * (settings["power"] - 4.2 + narrower + 0.1 * config.seed) ** 2
                record = {"settings": settings, "seed": config.seed, "loss": loss}
                found.append(record | {"status": "finished"})
                file.write(json.dumps(found[-1]) + "\n")
                trained.append((settings["width"], settings["rules"], settings["power"]))
        return found

    monkeypatch.setattr(trials, "run_trials", run)
    path = tmp_path / "transfer_width.jsonl"
    for series in cells(["adamw"]):
        tune(series, 2, path)
    tried = [power for width, rules, power in trained if width == 32 and not rules]
    assert sorted(set(tried)) == list(range(-2, 6))  # six around 0, then as far as the best one
    found = read_losses(path)
    assert optimum(found[Cell("adamw", 256, False)])[0] == pytest.approx(1.15)
    assert optimum(found[Cell("adamw", 256, True)])[0] == pytest.approx(4.15)
    assert optimum(found[Cell("adamw", 256, True, True)])[0] == pytest.approx(3.25)
    transfer_page.write(tmp_path, found, make_config(Cell("adamw", 32, False), 0, 0))
    page = (tmp_path / "transfer_width.md").read_text()
    without, rules = 3 + 0.1 * 2.85**2 + 0.00025, 3.0025  # at power 4, by which the base is best
    assert f"| 2 | 2^3.00 | 3.0025 | {without:.4f} |" in page
    assert f"| 2 | 2^0.00 | 3.0025 | {rules:.4f} |" in page
    assert (tmp_path / "transfer_width.png").stat().st_size > 10_000
