"""Options that change while training, and those that cannot."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj
from shampoo_jax.base.hyperparameters import TRACED

rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


PARAMS, *GRADIENTS = ({"kernel": normal(3, 3), "bias": normal(3)} for _ in range(5))


def run(tx, change=None, params=PARAMS):
    """Updates at constant parameters; `change` is applied to the state before each step."""
    with jax.disable_jit():
        state, updates = tx.init(params), []
        for t, g in enumerate(GRADIENTS):
            if change is not None:
                change(t, state)
            new, state = tx.update(g, state, params)
            updates.append(new)
    return updates


def assert_close(a, b, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * float(jnp.abs(y).max()))


SHAMPOO = dict(learning_rate=0.1, b1=0.8, b2=0.7, every=2, weight_decay=0.1, momentum=0.5)
KL = dict(learning_rate=0.1, b1=0.8, b2=0.7, eps=1e-3, every=2)
SOAP = {**KL, "factor_b2": 0.6}


def matrices_only(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


DAMPED = sj.ShiftedEigh(0.1)
GRAFT = sj.scale_by_second_moment(0.5, 1e-3)

# Name -> (factory, options that are to be traced, static options).
CASES = {
    "scale_by_shampoo": (
        sj.scale_by_shampoo,
        dict(b1=0.8, b2=0.7, b3=0.6, every=2),
        dict(blocking=sj.Blocking(2, 1, False), refresh=sj.Refresh(3), exponents={2: 0.3}),
    ),
    "absolute cutoff": (
        sj.scale_by_shampoo,
        dict(every=1),
        dict(graft=None, solver=sj.TruncatedEigh(atol=1e-3)),
    ),
    "sums": (sj.scale_by_shampoo, dict(b2=1.0), dict(weighted=True)),
    "shifted_eigh": (sj.scale_by_shampoo, dict(b2=0.7), dict(solver=sj.ShiftedEigh(1e-3))),
    "shampoo": (
        sj.shampoo,
        SHAMPOO,
        dict(
            blocking=sj.Blocking(dimension_numbers=lambda path, leaf: None),
            decay=sj.Decay(mask=matrices_only),
            others=optax.adamw(0.1, 0.7, 0.6, 1e-3),
        ),
    ),
    "parts": (
        sj.shampoo,
        dict(learning_rate=0.1, b1=0.8, weight_decay=0.1),
        dict(graft=GRAFT, momentum=sj.momentum(0.5, nesterov=True), decay=sj.Decay("l2")),
    ),
    "relative decay": (
        sj.shampoo,
        SHAMPOO,
        dict(
            decay=sj.Decay("lr_over_peak", peak_lr=0.2),
            preconditioned=lambda path, leaf: leaf.ndim == 2,
        ),
    ),
    "soap": (
        sj.soap,
        SOAP,
        dict(basis="qr", rtol=1e-3, refresh=sj.BasisRefresh(reorder=False), monitor=3),
    ),
    "meta's soap": (
        sj.scale_by_soap,
        dict(b1=0.8, b2=0.7, eps=1e-3, factor_b2=0.6, every=2),
        dict(
            refresh=sj.BasisRefresh(when="before", skip_first=False, reorder=False),
            damping=1e-3,
            graft=GRAFT,
            basis="eigh",
        ),
    ),
    "kl_shampoo": (sj.kl_shampoo, {**KL, "first_weight": 0.5}, dict(max_scale=100.0, rtol=1e-3)),
    "kl_soap": (sj.kl_soap, SOAP, dict(normalize=False)),
    "one_sided_shampoo": (sj.one_sided_shampoo, SHAMPOO, dict(side="left", graft="adam")),
    "filter_gradient": (sj.filter_gradient, dict(b1=0.8, b3=0.7), dict(bias_correction=False)),
    "scale_by_second_moment": (sj.scale_by_second_moment, dict(b2=0.5, eps=1e-3), {}),
    "momentum": (sj.momentum, dict(decay=0.8, dampening=0.3), dict(nesterov=True)),
    "averaging": (
        sj.averaging,
        dict(learning_rate=0.1, eval_coeff=0.7),
        dict(inner=optax.sgd(0.1), kind="primal"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_traced_options_give_the_untraced_run(name):
    factory, traced, static = CASES[name]
    tx = sj.inject_hyperparams(factory)(**traced, **static)
    # Under jit all of them are tracers.
    state = jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.structure(
        jax.eval_shape(tx.update, GRADIENTS[0], state, PARAMS)[1]
    ) == jax.tree.structure(state)
    assert traced.keys() <= state.hyperparams.keys()
    assert not static.keys() & state.hyperparams.keys()
    # 1 - b2 is rounded to float32 where b2 is traced; factors multiply that by their condition.
    assert_close(run(tx), run(factory(**traced, **static)), 1e-4)


SHIFTED = dict(SHAMPOO, solver=DAMPED, graft=GRAFT)


@functools.cache
def unchanged():
    return run(sj.shampoo(**SHIFTED))


@pytest.mark.parametrize(
    "option",
    ["learning_rate", "b1", "b2", "every", "weight_decay", "momentum"],
)
def test_each_option_alone_as_a_schedule_and_changed_by_hand(option):
    values = SHIFTED
    new = 3 if option == "every" else 0.5 * values[option]

    def change(t, state):
        state.hyperparams[option] = jnp.asarray(new if t >= 2 else values[option])

    by_hand = run(sj.inject_hyperparams(sj.shampoo)(**values), change)
    schedule = lambda t: jnp.where(t >= 2, new, values[option])  # noqa: E731
    by_schedule = run(sj.inject_hyperparams(sj.shampoo)(**{**values, option: schedule}))
    assert_close(by_schedule, by_hand)
    start = unchanged()
    assert_close(by_hand[:2], start[:2])
    differences = [u["kernel"] - v["kernel"] for u, v in zip(by_hand[2:], start[2:], strict=True)]
    assert np.abs(differences).max() > 1e-4
    if option == "learning_rate":
        assert_close(by_hand[2:], run(sj.shampoo(**{**values, option: new}))[2:])


def test_floats_are_float32_whatever_the_parameters():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = sj.inject_hyperparams(sj.shampoo)(0.1, b2=0.999)
    state = tx.init(half)
    assert state.hyperparams["b2"] == np.float32(0.999)
    assert state.hyperparams["every"].dtype == jnp.int32
    updates, new = jax.eval_shape(tx.update, half, state, half)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)


def test_one_program_for_all_values():
    tx, traces = sj.inject_hyperparams(sj.shampoo)(0.1, every=2), []

    def update(g, state):
        traces.append(None)
        return tx.update(g, state, PARAMS)

    state, update = tx.init(PARAMS), jax.jit(update)
    for rate in (0.1, 0.2, 0.3):
        state.hyperparams["learning_rate"] = jnp.asarray(rate)
        state.hyperparams["every"] = jnp.asarray(int(10 * rate))
        _, state = update(GRADIENTS[0], state)
    assert len(traces) == 1


def test_an_option_may_be_kept_static():
    tx = sj.inject_hyperparams(sj.shampoo, static_args=["b1"])(0.1, b1=0.9)
    assert "b1" not in tx.init(PARAMS).hyperparams


STATIC = {
    sj.shampoo: ["blocking", "refresh", "exponents", "solver", "statistics", "graft", "others"]
    + ["bias_correction", "weighted", "monitor", "preconditioned", "placement"],
    sj.soap: ["basis", "refresh", "rtol", "exponents"],
    sj.kl_shampoo: ["max_scale", "blocking"],
    sj.kl_soap: ["basis", "normalize"],
    sj.one_sided_shampoo: ["side", "refresh"],
}


@pytest.mark.parametrize(
    ("factory", "name"), [(f, n) for f, names in STATIC.items() for n in names]
)
def test_a_tracer_for_a_static_option_is_refused(factory, name):
    message = rf"{name}=.* is a static option.*static_args.*shampoo_jax\.inject_hyperparams"
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda value: factory(0.1, **{name: value}).init(PARAMS))(1)
    with pytest.raises(ValueError, match=message):
        sj.inject_hyperparams(factory)(0.1, **{name: jnp.asarray(1)}).init(PARAMS)


def test_plain_optax_wrapper_says_what_to_do():
    tx = optax.inject_hyperparams(sj.scale_by_shampoo)(monitor=2)
    with pytest.raises(ValueError, match=r"monitor=2 is a static option"):
        tx.init(PARAMS)


@pytest.mark.parametrize("name", ["size", "merge", "canonical"])
def test_blocking_refuses_tracers(name):
    with pytest.raises(ValueError, match=f"{name}=.* is a static option"):
        jax.jit(lambda m: sj.Blocking(**{name: m}).merge)(1)


def test_every_option_that_is_traced_belongs_to_some_factory():
    factories = [f for f, _, _ in CASES.values()] + [sj.add_scheduled_weight_decay]
    factories += [sj.floor_update, sj.radial_brake, sj.tail_average]
    assert set().union(*(inspect.signature(f).parameters for f in factories)) >= TRACED


def test_numbers_within_objects_may_be_tracers():
    """Damping, cutoffs and the decay of a graft enter the arithmetic only."""

    def step(damping, b2):
        graft = sj.scale_by_second_moment(b2, 1e-3)
        tx = sj.shampoo(0.1, solver=sj.ShiftedEigh(damping), graft=graft)
        return tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS)[0]

    assert_close(jax.jit(step)(0.1, 0.5), step(0.1, 0.5))


@pytest.mark.parametrize("solver", ["higher_order_newton", sj.ShiftedEigh(0.0)])
def test_solvers_contradict_no_traced_option(solver):
    jax.eval_shape(sj.inject_hyperparams(sj.shampoo)(0.1, every=2, solver=solver).init, PARAMS)
