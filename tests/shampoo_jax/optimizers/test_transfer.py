"""Rules of transfer: the multipliers of the authors' code, properties, and what is refused."""

import itertools
import json
import math
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax
from scripts.maintenance import golden_multipliers
from scripts.maintenance.golden_multipliers import EPS, OPTIMIZERS, rules_of
from shampoo_jax import Multipliers, transfer_rules

FILE = Path(__file__).parents[2] / "golden" / "methods" / "b_mup_multipliers.json"
RECORDED = json.loads(FILE.read_text())
SCENARIOS = RECORDED["scenarios"]


def test_all_multipliers_are_those_recorded():
    assert {*itertools.chain(*(s["learning_rate"] for s in SCENARIOS.values()))} == set(OPTIMIZERS)
    assert {*itertools.chain(*(s["eps"] for s in SCENARIOS.values()))} == set(EPS)
    assert max(golden_multipliers.errors(FILE).values()) <= 1


def test_another_multiplier_is_seen(monkeypatch):
    made = golden_multipliers.transfer_rules

    def wrong(*trees, **options):
        rules = made(*trees, **options)
        kind = {n: m._replace(eps=1.01 * m.eps) for n, m in rules.multipliers.items()}
        return types.SimpleNamespace(multipliers=kind, residual=2 * rules.residual)

    monkeypatch.setattr(golden_multipliers, "transfer_rules", wrong)
    found = golden_multipliers.errors(FILE)
    assert {kind for kind, worst in found.items() if worst > 1} == {"eps", "residual branches"}


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"records": []}')
    with pytest.raises(ValueError, match="no scenarios and weight_decay"):
        golden_multipliers.errors(path)
    changed = json.loads(FILE.read_text())
    next(iter(changed["scenarios"].values()))["eps"]["lion"] = {}
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="eps of 'lion' is unknown: we have adam"):
        golden_multipliers.errors(path)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("optimizer", ["shampoo", "shampoo2"])
def test_ungrafted_shampoo_of_the_experiments_branch_is_that_of_whole_matrices(name, optimizer):
    scenario = SCENARIOS[name]
    if scenario["setting"]["V"] > scenario["setting"]["max_precond_dim"]:
        scenario = {**scenario, "setting": {**scenario["setting"], "max_precond_dim": math.inf}}
    found = rules_of(scenario, optimizer, cut=False).multipliers
    for parameter, values in scenario["learning_rate"][optimizer].items():
        assert found[parameter].learning_rate == pytest.approx(values["lr"], rel=1e-6), parameter


def test_what_a_graft_and_a_basis_bring():
    """A graft by Adam brings Adam's eps; a basis is shifted like a factor, whatever the batch."""
    for scenario in SCENARIOS.values():
        batch = scenario["setting"]["B"] / scenario["setting"]["base_B"]
        names = ("adam", "grafted_shampoo", "shampoo", "soap")
        adam, grafted, shampoo, soap = (rules_of(scenario, n).multipliers for n in names)
        assert grafted["embed"].eps == adam["embed"].eps
        assert soap["readout"].damping == shampoo["readout"].damping * batch
        decay = scenario["setting"]["base_D"] / scenario["setting"]["D"]
        assert {m.decay for m in adam.values()} == {decay}


@pytest.mark.parametrize("method", ["adam", "sgd", "muon", "shampoo", "soap"])
@pytest.mark.parametrize("graft", ["adam", "sgd", None])
def test_a_model_transfers_to_itself_unchanged(method, graft):
    params = {"mlp": {"w": jnp.ones((6, 24)), "b": jnp.ones(24)}, "gain": jnp.ones(())}
    blocking = shampoo_jax.Blocking(4)
    rules = transfer_rules(params, params, method, graft=graft, blocking=blocking, exponents=0.5)
    assert set(rules.multipliers.values()) == {Multipliers()} and rules.residual == 1


def test_sides_follow_exponents_and_blocks_follow_blocking():
    base, wide = ({"w": jnp.ones((d, 2 * d))} for d in (4, 16))
    right = transfer_rules(base, wide, "soap", exponents="right").multipliers["w"]
    assert (right.learning_rate, right.eps) == (pytest.approx(0.5), pytest.approx(0.5))
    cut = dict(exponents="smaller", blocking=shampoo_jax.Blocking(4), graft=None)
    # One factor on the smaller side, along which alone blocks are cut: four of them.
    assert transfer_rules(base, wide, "shampoo", **cut).multipliers["w"] == Multipliers(
        pytest.approx(4**-0.5), 1.0, 0.25, pytest.approx(2.0), 0.25
    )


def test_flax_kernels_are_read_from_inputs_to_outputs():
    def tree(heads):
        kernel = jnp.ones((4 * heads, heads, 4))
        return {"query": {"kernel": kernel}, "out": {"kernel": kernel.transpose(1, 2, 0)}}

    found = transfer_rules(tree(2), tree(6), "sgd").multipliers
    assert {m.learning_rate for m in found.values()} == {1.0}  # 3 / 3
    plain = {"w": jnp.ones((2, 3, 8))}  # all axes but the last are inputs
    wide = {"w": jnp.ones((2, 9, 8))}
    assert transfer_rules(plain, wide, "adam").multipliers["w"].learning_rate == 1 / 3


def model(d):
    return {"embed": jnp.ones((9, d)), "w": jnp.ones((d, d)), "head": jnp.ones((d, 9))}


@pytest.mark.parametrize("jit", [False, True])
def test_the_rate_chains_with_a_stock_optimizer(jit):
    rules = transfer_rules(model(2), model(8), "adam")
    tx = optax.chain(optax.adam(0.1), shampoo_jax.scale_per_parameter(rules.learning_rate))
    params = model(8)
    update = jax.jit(tx.update) if jit else tx.update
    updates, _ = update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["embed"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["w"], -0.025, rtol=1e-5)


def test_parameters_of_the_same_multipliers_share_an_optimizer():
    params, made = model(8), []
    rules = transfer_rules(model(2), params, "muon", depth=2.0)

    def make(m):
        made.append(m)
        return optax.chain(optax.scale(m.eps), optax.add_decayed_weights(m.decay))

    tx = rules.partition(make)
    assert len(made) == 3
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    values = {name: float(u[0, 0]) for name, u in updates.items()}
    assert values == {"embed": 0.25 + 0.25, "w": 0.5 + 0.25, "head": 1.0 + 0.25}
    missing, state = tx.update({**params, "embed": None}, state, params)
    assert missing["embed"] is None and missing["w"][0, 0] == 0.75
    skipped, state = tx.update({**params, "embed": params["embed"] * jnp.nan}, state, params)
    assert not any(np.any(u) for u in skipped.values()) and state.total_notfinite == 1


def test_a_direction_of_this_package_takes_damping_and_eps_by_parameter():
    base, params = ({"a": jnp.ones((d, d))} for d in (4, 8))
    options = dict(exponents=0.5, blocking=shampoo_jax.Blocking(4))
    rules = transfer_rules(base, params, "shampoo", **options, graft=None)
    tx = rules.partition(
        lambda m: shampoo_jax.scale_by_shampoo(
            0.0, solver=shampoo_jax.ShiftedEigh(16 * m.damping), graft=None, **options
        )
    )
    updates, _ = tx.update(params, tx.init(params), params)
    assert rules.multipliers["a"].damping == 1 / 4
    # One block of ones: factors 4 J with eigenvalue 16.
    np.testing.assert_allclose(updates["a"], 1 / (16 + 16 / 4), rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(method="adamw"), "method='adamw'.*'adam'"),
        (dict(others="adamw"), "others='adamw'"),
        (dict(graft="lion"), "graft='lion'"),
        (dict(depth=0.0), "depth=0.0 must be positive"),
        (dict(batch=-1), "batch=-1 must be positive"),
        (dict(blocking=4), "blocking=4: give a Blocking"),
        (dict(normalized=1), "normalized=1 must be True or False"),
        (dict(params={"v": jnp.ones((2, 2))}), "'v' is not in base_params"),
        (dict(params={"w": jnp.ones((2, 2, 2))}), r"'w' has shape \(2, 2, 2\), and \(2, 2\)"),
        (dict(params={"w": jnp.ones((2, 0))}), "none of them empty"),
    ],
)
def test_what_makes_no_rule_is_refused(change, message):
    tree = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=message):
        transfer_rules(**{"base_params": tree, "params": tree, "method": "adam", **change})


def test_a_parameter_without_a_rule_is_named():
    rules = transfer_rules(model(2), model(4), "adam")
    tx = shampoo_jax.scale_per_parameter(rules.learning_rate)
    with pytest.raises(ValueError, match="'new' was not among params"):
        tx.update({"new": jnp.ones(2)}, tx.init(None))
