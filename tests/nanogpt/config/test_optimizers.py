"""Published recipes against the curves; and optimizers of a user's own."""

import csv
import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanogpt.config import presets
from nanogpt.config.presets import PRESETS, PUBLISHED, preset
from nanogpt.config.run import ScheduleConfig
from nanogpt.config.settings import LionConfig, MatrixConfig
from nanogpt.optimizers import build as optimizers
from nanogpt.optimizers.build import REGISTRY, build_optimizer, register

CURVES = Path(__file__).parents[3] / "nanogpt/report/published"
LOGGED = {  # of the others no curve is published
    "adamw_record2": "t3_02_adamw_5625",
    "adamh": "t3_04_adamh_4875",
    "muon_track3": "t3_36_muon_tuned_3250",
    "muon_record12": "t3_12_muon_3325",
    "muon_mlp_decay": "t2_r08_2025-04-22_muon_5960",
    "muonh": "t3_05_muonh_3325",
    "shampoo": "t3_35_shampoo_pinv_3375",
    "shampoo_record21": "t3_21_shampoo_4100",
    "soap_h": "t3_27_soaph_3125",
    "kl_soap_h": "t3_19_klsoaph_3125",
    "psgd": "t3_33_psgd_3375",
}


@pytest.mark.parametrize("name", LOGGED)
def test_expected_results_are_those_of_the_curves(name):
    published = PUBLISHED[name]
    lines = (CURVES / f"{LOGGED[name]}.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    at_end = [float(r["val_loss"]) for r in rows if int(r["step"]) == published.expected_steps]
    assert len(at_end) == published.expected_runs
    assert np.mean(at_end) == pytest.approx(published.expected_loss, abs=6e-6)
    # What the log was made with, in the words of the file's head.
    head = next(line for line in lines if line.startswith("# hyperparameters"))
    rate = f"{preset('track3', name).matrices.learning_rate:g}".lstrip("0")
    assert re.search(rf"lr\s?{re.escape(rate)}\b", head), (rate, head)


def test_every_entry_says_where_it_comes_from_and_what_to_expect():
    for name, published in PUBLISHED.items():
        assert published.source, name
        known = published.expected_steps, published.expected_loss, published.expected_runs
        assert all(known) or not any(known), name
        assert published.note or all(known), name
        if published.expected_steps:
            assert published.expected_steps <= preset("track3", name).schedule.steps, name
    assert [name for name, p in PUBLISHED.items() if not p.inside_rules] == ["sophia"]


def test_a_published_result_is_the_mean_of_the_runs_in_the_pull_requests():
    runs = [3.27787, 3.27645, 3.27713, 3.27813]
    assert PUBLISHED["shampoo_third"].expected_loss == pytest.approx(np.mean(runs), abs=1e-9)
    assert preset("track3", "shampoo_third").matrices.exponent == 1 / 3


def matrices_after_one_step(name, gradient):
    """The kernels "mlp" and "attn" after one step of a track 3 recipe from ones."""
    config = preset("track3", name)
    params = {
        "blocks": {
            "0": {
                "mlp": {"fc": {"kernel": jnp.ones((4, 8))}},
                "attn": {"q": {"kernel": jnp.eye(4)}},
            }
        }
    }
    grads = jax.tree.map(lambda p: gradient * p, params)
    tx = build_optimizer(config, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    block = optax.apply_updates(params, updates)["blocks"]["0"]
    return block["mlp"]["fc"]["kernel"], block["attn"]["q"]["kernel"], config


def test_twice_the_decay_on_mlps_alone():
    """A zero gradient leaves the decay: lr 0.025 times 0.01, or times 0.02."""
    mlp, attention, _ = matrices_after_one_step("muon_mlp_decay", 0.0)
    np.testing.assert_allclose(mlp, 1 - 0.025 * 0.02, rtol=1e-6)
    np.testing.assert_allclose(attention, (1 - 0.025 * 0.01) * np.eye(4), rtol=1e-6)


def test_updates_of_fixed_norm_and_hyperballs_have_it():
    """Pull request 327: |update| = lr sqrt(outputs); #27: |W| stays."""
    mlp, attention, config = matrices_after_one_step("shampoo_third", 1.0)
    rate, decay = config.matrices.learning_rate, config.matrices.weight_decay
    start = np.ones((4, 8)) * (1 - rate * decay)
    np.testing.assert_allclose(np.linalg.norm(mlp - start), rate * 8**0.5, rtol=1e-4)
    mlp, attention, _ = matrices_after_one_step("adamh", 1.0)
    np.testing.assert_allclose(np.linalg.norm(mlp), 32**0.5, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(attention), 2.0, rtol=1e-5)


def multipliers_at(name, count):
    """Eta of block matrices and of the head at an update, read from steps of Lion and Adam."""
    config = preset("track3", name)
    config = dataclasses.replace(config, optimizer="lion", matrices=LionConfig(0.01, 0.0))
    ones = jnp.ones((2, 2))
    w = {"blocks": {"0": {"mlp": {"fc": {"kernel": ones}}}}, "head": {"kernel": ones}}
    tx = build_optimizer(config, w)
    later = lambda x: jnp.full_like(x, count) if x.dtype == jnp.int32 else x  # noqa: E731
    updates, _ = tx.update(w, jax.tree.map(later, tx.init(w)), w)
    # Moments that start here, but are corrected as if for `count` updates.
    first = 0.2 / (1 - 0.8 ** (count + 1)) * ((1 - 0.95 ** (count + 1)) / 0.05) ** 0.5
    head = updates["head"]["kernel"][0, 0] / first / config.auxiliary.head_learning_rate
    return -updates["blocks"]["0"]["mlp"]["fc"]["kernel"][0, 0] / 0.01, -head


@pytest.mark.parametrize(
    ("name", "count", "matrices", "head"),
    [
        # #27: (1 - s/3200)^1.25; the rest is flat until 60 % of 3125, then falls to 0.
        ("soap_h", 800, 0.75**1.25, 1.0),
        ("soap_h", 2500, (700 / 3200) ** 1.25, 0.5),
        # #4: s/250, then 1 - s/4875; the rest has no warmup, and falls over the last 40 %.
        ("adamh", 0, 0.0, 1.0),
        ("adamh", 125, 0.5, 1.0),
        ("adamh", 1950, 0.6, 1.0),
        ("adamh", 3900, 0.2, 0.5),
    ],
)
def test_matrices_have_schedules_of_their_own(name, count, matrices, head):
    np.testing.assert_allclose(multipliers_at(name, count), (matrices, head), rtol=1e-4)


def test_eps_of_scripts_with_a_mean_loss_are_on_the_scale_of_sums():
    """#33 and the medium track add 1e-10 to gradients that are 2^19 times smaller than ours."""
    runs = {name: preset("track3", name) for name in PUBLISHED}
    means = [name for name, run in runs.items() if run.auxiliary.eps != 1e-10]
    assert means == ["muon_mlp_decay", "psgd"]
    assert {runs[name].auxiliary.eps for name in means} == {1e-10 * 2**19}
    assert runs["adamh"].matrices.eps == 1e-8


def test_lion_is_set_by_the_rule_of_its_paper():
    lion, adamw = (preset("track3", name) for name in ("lion", "adamw"))
    assert lion.matrices.learning_rate == pytest.approx(adamw.matrices.learning_rate / 10)
    assert lion.matrices.weight_decay == 10 * adamw.matrices.weight_decay
    assert (lion.schedule, lion.auxiliary) == (adamw.schedule, adamw.auxiliary)


def test_own_optimizers_have_every_preset_and_may_be_changed(monkeypatch):
    monkeypatch.setattr(optimizers, "REGISTRY", dict(REGISTRY))
    monkeypatch.setattr(presets, "OWN", {})

    @dataclasses.dataclass(frozen=True)
    class Own(MatrixConfig):
        power: float = 0.5

    def direction(settings, placement):
        return optax.stateless_with_tree_map(
            lambda g, _: jnp.sign(g) * jnp.abs(g) ** settings.power
        )

    register("own", direction, Own(0.5, 0.0))
    register("own", direction, Own(0.25, 0.0))  # as when a notebook's cell runs again
    for name in PRESETS:
        config = preset(name, "own")
        assert config.matrices == Own(0.25, 0.0)
        assert config.auxiliary == preset(name, "adamw").auxiliary
    config = dataclasses.replace(config, schedule=ScheduleConfig(10))
    w = {"blocks": {"0": {"mlp": {"fc": {"kernel": jnp.full((2, 2), 4.0)}}}}}
    tx = build_optimizer(config, w)
    updates, _ = tx.update(w, tx.init(w), w)
    np.testing.assert_allclose(jax.tree.leaves(updates)[0], -0.25 * 4.0**0.5, rtol=1e-6)


def test_a_group_asks_for_the_loss_at_its_own_parameters(monkeypatch):
    """Its gradient there is the group's; the other parameters stay as they are."""
    monkeypatch.setattr(optimizers, "REGISTRY", dict(REGISTRY))

    def direction(settings, placement):
        def update(updates, state, params, obj_fn, **_):
            return jax.grad(obj_fn)(params), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    register("asks", direction, MatrixConfig(1.0, 0.0))
    config = dataclasses.replace(
        preset("board", "adamw"),
        optimizer="asks",
        matrices=MatrixConfig(1.0, 0.0),
        schedule=ScheduleConfig(10),
    )
    w, head = jnp.array([[2.0, 3.0]]), jnp.array([[5.0]])
    params = {"blocks": {"0": {"mlp": {"fc": {"kernel": w}}}}, "head": {"kernel": head}}

    def loss(p):
        return jnp.sum(p["blocks"]["0"]["mlp"]["fc"]["kernel"] ** 2) * jnp.sum(p["head"]["kernel"])

    tx = build_optimizer(config, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params, obj_fn=loss)
    np.testing.assert_allclose(
        updates["blocks"]["0"]["mlp"]["fc"]["kernel"], -2 * w * 5.0, rtol=1e-6
    )


def sign(settings, placement):
    return optax.scale_by_sign()


@pytest.mark.parametrize(
    ("name", "direction", "settings", "message"),
    [
        ("muon", sign, MatrixConfig(0.1, 0.0), "name='muon' is taken"),
        ("soap_h", sign, MatrixConfig(0.1, 0.0), "name='soap_h' is taken"),
        ("a/b", sign, MatrixConfig(0.1, 0.0), "name='a/b': must be of letters"),
        ("own", optax.scale_by_sign(), MatrixConfig(0.1, 0.0), "must be a function of"),
        ("own", lambda settings: sign(settings, None), MatrixConfig(0.1, 0.0), "of .settings, pl"),
        ("own", sign, {"learning_rate": 0.1}, "settings={'learning_rate': 0.1}: must be a Mat"),
        ("own", sign, MatrixConfig, "must be a MatrixConfig, as"),
    ],
)
def test_what_is_no_optimizer_is_not_registered(name, direction, settings, message):
    with pytest.raises(ValueError, match=message):
        register(name, direction, settings)
    assert "own" not in REGISTRY


def test_a_direction_that_returns_something_else_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(optimizers, "REGISTRY", dict(REGISTRY))
    register("own", lambda settings, placement: 3, MatrixConfig(0.1, 0.0))
    config = dataclasses.replace(
        preset("board", "adamw"), optimizer="own", matrices=MatrixConfig(0.1, 0.0)
    )
    with pytest.raises(ValueError, match="optimizer='own': its direction is 3"):
        build_optimizer(config, {})


def build(monkeypatch, direction):
    monkeypatch.setattr(optimizers, "REGISTRY", dict(REGISTRY))
    monkeypatch.setattr(presets, "OWN", {})
    register("own", lambda settings, placement: direction, MatrixConfig(0.1, 0.0))
    return build_optimizer(preset("board", "own"), {})


WARMUP = optax.warmup_cosine_decay_schedule(0.0, 0.1, 100, 1000)


@pytest.mark.parametrize(
    "complete", [optax.adamw(0.1), optax.sgd(0.1), optax.lion(0.1), optax.adamw(WARMUP)]
)
def test_a_complete_optimizer_is_no_direction(monkeypatch, complete):
    with pytest.raises(ValueError, match="optimizer='own': its direction goes against the grad"):
        build(monkeypatch, complete)


def test_an_own_direction_can_be_built_while_a_program_is_traced(monkeypatch):
    """As the ablations do, whose rates are traced: its trial needs numbers."""

    def begin(x):
        build(monkeypatch, optax.scale_by_adam())
        return x

    assert jax.jit(begin)(1.0) == 1.0


@pytest.mark.parametrize("factor", [0.0, np.nan, np.inf])
def test_a_direction_that_leads_nowhere_is_refused(monkeypatch, factor):
    with pytest.raises(ValueError, match="optimizer='own': its direction is zero or not finite"):
        build(monkeypatch, optax.scale(factor))


def test_a_direction_may_start_late_and_decay_weights(monkeypatch):
    late = optax.scale_by_schedule(lambda count: 1.0 * (count > 0))
    build(monkeypatch, optax.chain(late, optax.add_decayed_weights(-10.0)))
