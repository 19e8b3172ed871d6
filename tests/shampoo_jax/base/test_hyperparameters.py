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


# Name -> (factory, options that are to be traced, static options).
CASES = {
    "scale_by_shampoo": (
        sj.scale_by_shampoo,
        dict(b1=0.8, b2=0.7, b3=0.6, rtol=1e-3, graft_b2=0.5, graft_eps=1e-3, every=2),
        dict(block_size=2, merge=1, canonical=False, start=3, exponents={2: 0.3}),
    ),
    "absolute cutoff": (sj.scale_by_shampoo, dict(atol=1e-3, every=1), dict(graft=None)),
    "sums": (sj.scale_by_shampoo, dict(b2=1.0), dict(weighted=True)),
    "shifted_eigh": (sj.scale_by_shampoo, dict(eps=1e-3), dict(solver="shifted_eigh")),
    "shampoo": (
        sj.shampoo,
        {**SHAMPOO, "dampening": 0.2, "adamw_b1": 0.7, "adamw_eps": 1e-3, "adamw_b2": 0.6},
        dict(nesterov=True, dimension_numbers=lambda path, leaf: None, mask=matrices_only),
    ),
    "relative decay": (
        sj.shampoo,
        {**SHAMPOO, "peak_lr": 0.2, "adamw_learning_rate": 0.3, "adamw_weight_decay": 0.2},
        dict(weight_decay_kind="lr_over_peak", preconditioned=lambda path, leaf: leaf.ndim == 2),
    ),
    "soap": (
        sj.soap,
        {**SOAP, "rtol": 1e-3},
        dict(basis="qr", skip_first=True, reorder=False, monitor=3),
    ),
    "meta's soap": (
        sj.soap,
        {**SOAP, "factor_eps": 1e-3, "graft_b2": 0.5},
        dict(refresh="before", skip_first=False, reorder=False, graft="rmsprop", basis="eigh"),
    ),
    "kl_shampoo": (sj.kl_shampoo, {**KL, "first_weight": 0.5, "rtol": 1e-3}, dict(cap=100.0)),
    "kl_soap": (sj.kl_soap, SOAP, dict(nonfinite="skip_blocks")),
    "one_sided_shampoo": (sj.one_sided_shampoo, SHAMPOO, dict(side="left", graft="adam")),
    "filter_gradient": (sj.filter_gradient, dict(b1=0.8, b3=0.7), dict(bias_correction=False)),
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


SHIFTED = dict(SHAMPOO, eps=0.1, solver="shifted_eigh", graft_eps=1e-3)


@functools.cache
def unchanged():
    return run(sj.shampoo(**SHIFTED))


@pytest.mark.parametrize(
    "option",
    ["learning_rate", "b1", "b2", "eps", "every", "weight_decay", "momentum", "graft_eps"],
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
    sj.shampoo: ["block_size", "merge", "canonical", "start", "exponents", "solver", "cutoff"]
    + ["graft", "bias_correction", "weighted", "nonfinite", "monitor", "weight_decay_kind"]
    + ["nesterov", "preconditioned"],
    sj.soap: ["basis", "refresh", "skip_first", "reorder", "exponent", "start"],
    sj.kl_shampoo: ["cap", "block_size"],
    sj.kl_soap: ["basis", "merge"],
    sj.one_sided_shampoo: ["side", "start"],
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
    tx = optax.inject_hyperparams(sj.scale_by_shampoo)(block_size=2)
    with pytest.raises(ValueError, match=r"block_size=2 is a static option"):
        tx.init(PARAMS)


def test_blocked_alone_refuses_tracers():
    with pytest.raises(ValueError, match="merge=.* is a static option"):
        jax.jit(lambda m: sj.blocked(sj.filter_gradient(), merge=m).init(PARAMS))(1)


def test_every_option_that_is_traced_belongs_to_some_factory():
    factories = [f for f, _, _ in CASES.values()] + [sj.add_scheduled_weight_decay]
    assert set().union(*(inspect.signature(f).parameters for f in factories)) >= TRACED


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (sj.shampoo, dict(solver="higher_order_newton", atol=0.0)),
        (sj.shampoo, dict(eps=0.0)),
        (sj.soap, dict(factor_eps=1e-3, rtol=0.0)),
        (sj.soap, dict(factor_eps=0.0, rtol=None)),
    ],
)
def test_a_threshold_of_zero_contradicts_nothing(factory, options):
    jax.eval_shape(sj.inject_hyperparams(factory)(0.1, **options).init, PARAMS)
