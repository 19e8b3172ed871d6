"""Each kind of decay against numpy, its place in a chain, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shampoo_jax import Decay, add_scheduled_weight_decay, decay_parts

STEPS, PEAK, DECAY = 7, 0.2, 0.5
RATES = np.array([0.05, 0.1, 0.2, 0.2, 0.15, 0.1, 0.0])
ALPHA = {
    "decoupled": np.full(STEPS, DECAY),
    "lr_over_peak": DECAY * RATES / PEAK,
    "over_peak": np.full(STEPS, DECAY / PEAK),
}


RELATIVE = ("lr_over_peak", "over_peak")


def schedule(count):
    return jnp.asarray(RATES, jnp.float32)[count]


def problem():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=4)}
    grads = [{k: rng.normal(size=v.shape) for k, v in params.items()} for _ in range(STEPS)]
    return params, grads


def as_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def trajectory(tx, params, grads):
    params = as_float32(params)
    state = tx.init(params)
    traces = []

    @jax.jit
    def step(params, state, g):
        traces.append(g)
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    for g in grads:
        params, state = step(params, state, as_float32(g))
    assert len(traces) == 1
    return params


def assert_close(actual, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=2e-5, atol=2e-6)


def sign_step(gradient, params, lr, alpha):
    return params - lr * (np.sign(gradient) + alpha * params)


@pytest.mark.parametrize("kind", ALPHA)
def test_decay_of_the_direction_against_numpy(kind):
    params, grads = problem()
    before, after = decay_parts(DECAY, Decay(kind, PEAK if kind in RELATIVE else None), schedule)
    assert before == []
    tx = optax.chain(optax.sign_sgd(1.0), optax.scale(-1.0), *after)
    tx = optax.chain(tx, optax.scale_by_learning_rate(schedule))
    expected = params
    for t, g in enumerate(grads):
        expected = {k: sign_step(g[k], v, RATES[t], ALPHA[kind][t]) for k, v in expected.items()}
    assert_close(trajectory(tx, params, grads), expected)


def test_l2_enters_the_gradient():
    params, grads = problem()
    before, after = decay_parts(DECAY, Decay("l2"))
    assert after == []
    tx = optax.chain(*before, optax.sign_sgd(schedule))
    expected = params
    for t, g in enumerate(grads):
        expected = {k: v - RATES[t] * np.sign(g[k] + DECAY * v) for k, v in expected.items()}
    assert_close(trajectory(tx, params, grads), expected)


@pytest.mark.parametrize("kind", ["lr_over_peak", "over_peak"])
def test_a_constant_schedule_is_a_number_which_is_its_own_peak(kind):
    params, grads = problem()
    results = [
        trajectory(
            optax.chain(
                add_scheduled_weight_decay(DECAY, lr, kind=kind, peak_lr=peak),
                optax.scale_by_learning_rate(0.1),
            ),
            params,
            grads,
        )
        for lr, peak in ((0.1, None), (lambda count: 0.1, 0.1), (jnp.asarray(0.1), 0.1))
    ]
    for other in results[1:]:
        assert_close(other, results[0])


def test_decay_itself_may_be_a_schedule():
    tx = add_scheduled_weight_decay(lambda n: 2.0 * n, 0.5, kind="over_peak")
    params = jnp.ones(2)
    state = tx.init(params)
    for expected in (0.0, 4.0, 8.0):
        updates, state = tx.update(jnp.zeros(2), state, params)
        np.testing.assert_allclose(updates, [expected] * 2, rtol=1e-6)


@pytest.mark.parametrize("kind", ["l2", "decoupled", "lr_over_peak", "over_peak"])
def test_mask_and_dtype(kind):
    params = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)}
    before, after = decay_parts(jnp.asarray(0.5), Decay(kind, mask={"w": True, "b": False}), 0.1)
    (tx,) = before + after
    state = tx.init(params)
    updates, after_state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert updates["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates["b"], 0.0)
    assert np.all(np.asarray(updates["w"], np.float32) > 0)
    assert jax.tree.structure(state) == jax.tree.structure(after_state)


def test_state_does_not_depend_on_kind_or_value():
    params = jnp.ones(2)
    structures = {
        jax.tree.structure(add_scheduled_weight_decay(w, lr, kind=k, peak_lr=1.0).init(params))
        for k in ("lr_over_peak", "over_peak")
        for w in (0.0, 0.1, jnp.asarray(0.1))
        for lr in (0.1, schedule)
    }
    assert len(structures) == 1


def test_injected_hyperparameters_follow_their_values():
    build = optax.inject_hyperparams(add_scheduled_weight_decay)
    tx = build(weight_decay=0.5, learning_rate=0.1, kind="lr_over_peak", peak_lr=0.2)
    params = jnp.ones(2)
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    updates, state = update(jnp.zeros(2), state, params)
    np.testing.assert_allclose(updates, 0.25, rtol=1e-6)
    state.hyperparams["learning_rate"] = jnp.asarray(0.2)
    state.hyperparams["weight_decay"] = jnp.asarray(1.0)
    updates, state = update(jnp.zeros(2), state, params)
    np.testing.assert_allclose(updates, 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, 0.1, "decoupled", None), "kind='decoupled': use one of 'lr_over_peak'"),
        ((-0.1, 0.1, "over_peak", None), "weight_decay=-0.1"),
        ((0.1, schedule, "over_peak", None), "needs peak_lr"),
        ((0.1, jnp.asarray(0.1), "lr_over_peak", None), "needs peak_lr"),
        ((0.1, 0.0, "lr_over_peak", None), "peak_lr=0.0 must be positive"),
        ((0.1, schedule, "lr_over_peak", -1), "peak_lr=-1 must be positive"),
        ((float("nan"), 0.1, "over_peak", None), "weight_decay=nan"),
    ],
)
def test_bad_options_are_named(arguments, message):
    weight_decay, learning_rate, kind, peak_lr = arguments
    with pytest.raises(ValueError, match=message):
        add_scheduled_weight_decay(weight_decay, learning_rate, kind=kind, peak_lr=peak_lr)


def test_bad_parts_are_named():
    with pytest.raises(ValueError, match="weight_decay=-1"):
        decay_parts(-1, Decay("l2"))
    with pytest.raises(ValueError, match="needs peak_lr"):
        decay_parts(0.1, Decay("over_peak"), schedule)
    with pytest.raises(ValueError, match="needs peak_lr"):
        decay_parts(0.1, Decay("over_peak"))  # and no learning rate either


def test_no_form_means_decoupled():
    params = jnp.ones(2)
    (tx,) = decay_parts(0.5)[1]
    updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
    np.testing.assert_array_equal(updates, 0.5)
