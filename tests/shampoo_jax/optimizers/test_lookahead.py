"""EMA-Nesterov and averages of the last weights, against numpy, with any optimizer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj

RNG = np.random.default_rng(0)
P = {"w": RNG.normal(size=(3, 2)), "embed": RNG.normal(size=4)}
GRADIENTS = [jax.tree.map(lambda p: RNG.normal(size=p.shape), P) for _ in range(7)]


def ahead(step):
    return jnp.where((step >= 2) & (step < 5), 0.5 / (1 + step), 0.0)


def optimizer(share=0.6):
    averaged = lambda path, leaf: path[0].key != "embed"  # noqa: E731
    tail = sj.tail_average(3, tau=4.0, share=share, end=6, averaged=averaged)
    return optax.chain(optax.trace(0.5), optax.scale(-0.1), tail, sj.ema_nesterov(ahead, 0.9))


def oracle():
    """Held parameters, weights and averages after every step."""
    w, b, m, e = P["w"], np.zeros((3, 2)), np.zeros((3, 2)), np.zeros((3, 2))
    held = w
    for t, g in enumerate(GRADIENTS):
        m = 0.5 * m + g["w"]
        last, w = w, held - 0.1 * m
        b = 0.9 * b + 0.1 * (w - last)
        if t + 1 == 3:
            e = w
        elif 3 < t + 1 < 6:
            e = e + (w - e) / 4
        held = w + float(ahead(t + 1)) * b
        yield held, w, (0.4 * w + 0.6 * e if t + 1 >= 3 else w)


def test_a_run_equals_numpy():
    with jax.enable_x64(True):
        tx = optimizer()
        params = jax.tree.map(jnp.asarray, P)
        state, update = tx.init(params), jax.jit(tx.update)
        for g, (held, w, weights) in zip(GRADIENTS, oracle(), strict=True):
            updates, state = update(jax.tree.map(jnp.asarray, g), state, params)
            params = optax.apply_updates(params, updates)
            found = sj.eval_params(state, params)
            np.testing.assert_allclose(params["w"], held, rtol=0, atol=1e-14)
            np.testing.assert_allclose(found["w"], weights, rtol=0, atol=1e-14)
            np.testing.assert_allclose(state[3].last["w"], w, rtol=0, atol=1e-14)
            np.testing.assert_array_equal(found["embed"], state[3].last["embed"])


def test_state_is_in_the_dtypes_of_the_parameters():
    params = {"w": jnp.ones((2, 2), jnp.bfloat16), "v": jnp.ones(2)}
    tx = sj.ema_nesterov(0.5)
    state = tx.init(params)
    wide = jax.tree.map(lambda p: jnp.full(p.shape, -0.01), params)
    updates, after = jax.jit(tx.update)(wide, state, params)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    # The weights are rounded before they are moved ahead: 1 - 0.01 is no bfloat16.
    assert after.last["w"][0, 0] == jnp.bfloat16(0.99) and updates["w"].dtype == jnp.float32
    mean = sj.tail_average(1).init(params).mean
    assert {x.dtype for x in jax.tree.leaves(mean)} == {jnp.dtype("float32")}


def test_guard_skips_what_is_not_finite_and_leaves_what_is_missing():
    tx = sj.guard(optimizer())
    params = jax.tree.map(jnp.float32, P)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(ones, tx.init(params), params)
    bad = ones | {"w": ones["w"].at[0, 0].set(jnp.nan)}
    updates, after = tx.update(bad, state, params)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
    updates, after = tx.update(ones | {"w": None}, state, params)
    assert updates["w"] is None
    for old, new in ((state, after),):
        own = old.inner_state[3], new.inner_state[3]
        np.testing.assert_array_equal(own[0].last["w"], own[1].last["w"])
        assert (own[0].last["embed"] != own[1].last["embed"]).any()


def test_missing_without_a_guard():
    tx = optax.chain(sj.tail_average(1), sj.ema_nesterov(0.5))
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = tx.init(params)
    updates, after = tx.update({"a": None, "b": jnp.ones(2)}, state, params)
    assert updates["a"] is None and (after[1].last["a"] == params["a"]).all()
    assert (after[0].mean["a"] == 1).all() and (after[0].mean["b"] == 2).all()


@pytest.mark.parametrize("wrap", [sj.guard, lambda tx: tx])
def test_what_is_missing_in_the_first_step_of_the_average(wrap):
    """Its weights have not moved: the average begins with them."""
    tx = wrap(optax.chain(optax.scale(-1.0), sj.tail_average(2, tau=4.0, share=0.5)))
    params = {"a": jnp.full(2, 8.0)}
    state = tx.init(params)
    for gradient, expected in ((1.0, 7.0), (None, 7.0), (4.0, 4.5)):  # to 7 and 3; E is 7, then 6
        given = None if gradient is None else jnp.full(2, gradient)
        updates, state = tx.update({"a": given}, state, params)
        params = params if gradient is None else optax.apply_updates(params, updates)
        np.testing.assert_allclose(sj.eval_params(state, params)["a"], expected, rtol=1e-6)


def test_a_share_may_change():
    share = optax.linear_schedule(0.0, 1.0, 1)
    tx = sj.inject_hyperparams(sj.tail_average)(1, tau=2.0, share=share)
    params, state = jnp.array(0.0), tx.init(jnp.array(0.0))
    for step in (2.0, 4.0):  # to 2 and 6; E is 2, then 4
        updates, state = tx.update(jnp.array(step), state, params)
        params += updates
    assert float(sj.eval_params(state, params)) == 4.0


def test_an_infinite_average_is_a_reference():
    tx = optax.chain(optax.sgd(1.0), sj.tail_average(1, tau=math.inf, share=0.25))
    params = jnp.array(0.0)
    state = tx.init(params)
    for gradient in (-1.0, -8.0):
        updates, state = tx.update(jnp.array(gradient), state, params)
        params = optax.apply_updates(params, updates)
    assert float(sj.eval_params(state, params)) == 0.75 * 9 + 0.25 * 1


def test_groups_of_parameters_have_averages_of_their_own():
    labels = {"w": "averaged", "embed": "rest"}
    groups = {
        "averaged": optax.chain(optax.sgd(1.0), sj.tail_average(1, share=1.0)),
        "rest": optax.sgd(1.0),
    }
    tx, params = optax.partition(groups, labels), jax.tree.map(jnp.float32, P)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    found = sj.eval_params(state, params)
    np.testing.assert_allclose(found["w"], params["w"] + 1 - 1 / 150, rtol=1e-5)
    np.testing.assert_array_equal(found["embed"], params["embed"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sj.ema_nesterov(-1.0), "lookahead=-1.0 must not be negative"),
        (lambda: sj.ema_nesterov(0.5, 1.0), "decay=1.0"),
        (lambda: sj.tail_average(0), "start=0 must be at least 1"),
        (lambda: sj.tail_average(5, end=4), "end=4 must be at least 5"),
        (lambda: sj.tail_average(5, tau=0.5), "tau=0.5 must be at least 1"),
        (lambda: sj.tail_average(5, share=1.5), "share=1.5"),
        (lambda: sj.power_cool(1.0, 0), "end=0 must be positive"),
        (lambda: sj.power_cool(1.0, 9, power=0.0), "power=0.0 must be positive"),
        (lambda: sj.power_cool(1.0, 9, final=-1.0), "final=-1.0 must not be negative"),
        (lambda: sj.rise_and_fall(0.5, 1.0, warmup=1, cooldown=1, end=3), "high=1.0"),
        (lambda: sj.rise_and_fall(0.5, 0.9, warmup=0, cooldown=1, end=3), "warmup=0"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
