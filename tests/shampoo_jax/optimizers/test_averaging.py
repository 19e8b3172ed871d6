"""Averaging against numpy in the three-iterate form, and what wrappers and users ask of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shampoo_jax import Decay, averaging, check_finite, decay_parts, eval_params, shampoo
from shampoo_jax.optimizers.averaging import AveragingState

RATES = np.array([0.0, 0.05, 0.1, 0.2, 0.2, 0.15, 0.1, 0.05])
KINDS = ("primal", "schedule_free")


def schedule(count):
    return jnp.asarray(RATES, jnp.float32)[count]


def problem(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=4)}
    grads = [{k: rng.normal(size=v.shape) for k, v in params.items()} for _ in RATES]
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, grads))


def wide(tree):
    return {k: np.asarray(v, np.float64) for k, v in tree.items()}


def run(tx, params, grads):
    """All parameters on the way, and the last state; one compilation, everything donated."""
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)  # eagerly: a jitted one never shares memory with its arguments
    traces, path = [], []

    def step(params, state, g):
        traces.append(g)
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    for g in grads:
        params, state = step(params, state, g)
        path.append(jax.tree.map(np.asarray, params))
    assert len(traces) == 1
    return path, state, params


def oracle(y, grads, kind, mix, c, power, alphas):
    """(y, x) after each step of `z -= lr * g` as three float64 sequences, x never recovered from y.

    Decay moves z and keeps y, so that x moves by (1 - 1 / mix) times what z moves.
    """
    x, z, total = y, y, 0.0
    for t, g in enumerate(grads):
        shrink = RATES[t] * alphas[t]
        x = {k: x[k] + (1 - 1 / mix) * -shrink * z[k] for k in z}
        z = {k: z[k] - shrink * z[k] - RATES[t] * g[k] for k in z}
        weight = RATES[t] ** power if kind == "schedule_free" else 0.0
        total += weight
        keep = c if kind == "primal" else 1 - (weight / total if total else 1.0)
        x = {k: keep * x[k] + (1 - keep) * z[k] for k in z}
        y = {k: mix * x[k] + (1 - mix) * z[k] for k in z}
        yield y, x


ALPHA = {
    "decoupled": np.full(len(RATES), 0.7),
    "lr_over_peak": 0.7 * RATES / 0.2,
    "over_peak": np.full(len(RATES), 0.7 / 0.2),
}
RELATIVE = ("lr_over_peak", "over_peak")


@pytest.mark.parametrize("decay", [None, *ALPHA])
@pytest.mark.parametrize(
    ("kind", "mix", "c", "power"),
    [
        ("primal", 0.8, 0.9, None),
        ("primal", 1.0, 0.6, None),
        ("schedule_free", 0.8, None, 2.0),
        ("schedule_free", 0.9, None, 1.0),
    ],
)
def test_trajectory_against_numpy(kind, mix, c, power, decay):
    params, grads = problem()
    form = Decay(decay or "decoupled", 0.2 if decay in RELATIVE else None)
    after = decay_parts(0.7, form, schedule)[1] if decay else [optax.identity()]
    tx = averaging(
        optax.sgd(schedule),
        kind,
        learning_rate=schedule,
        train_coeff=mix,
        eval_coeff=c,
        lr_power=power,
        decay=after[0],
    )
    alphas = ALPHA[decay] if decay else np.zeros(len(RATES))
    path, state, last = run(tx, params, grads)
    expected = list(oracle(wide(params), [wide(g) for g in grads], kind, mix, c, power, alphas))
    for actual, (y, _) in zip(path, expected, strict=True):
        for k in y:
            np.testing.assert_allclose(actual[k], y[k], rtol=1e-5, atol=2e-6)
    for k, x in expected[-1][1].items():
        np.testing.assert_allclose(eval_params(state, last)[k], x, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_the_documented_ones(kind):
    params, grads = problem()
    given = {"eval_coeff": 0.9} if kind == "primal" else {"lr_power": 2}
    explicit = averaging(
        optax.sgd(schedule), kind, learning_rate=schedule, train_coeff=0.8, **given
    )
    plain = averaging(optax.sgd(schedule), kind, learning_rate=schedule)
    for a, b in zip(run(plain, params, grads)[0], run(explicit, params, grads)[0], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_all_iterates_start_at_the_parameters_and_evaluation_leaves_them_alone():
    params, _ = problem()
    state = averaging(optax.sgd(0.1), learning_rate=0.1).init(params)
    before = jax.tree.map(np.asarray, params)
    jax.tree.map(np.testing.assert_array_equal, eval_params(state, params), before)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_primal_averaging_is_momentum_when_it_trains_at_the_average():
    """Where y = x: heavy ball with decay c and a learning rate (1 - c) times as large."""
    params, grads = problem()
    tx = averaging(optax.sgd(0.1), learning_rate=0.1, train_coeff=1.0, eval_coeff=0.75)
    ours, _, _ = run(tx, params, grads)
    theirs, _, _ = run(optax.sgd(0.025, momentum=0.75), params, grads)
    for a, b in zip(ours, theirs, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


@pytest.mark.parametrize("rate", [0.1, lambda count: 0.1, jnp.asarray(0.1)])
def test_constant_rate_schedule_free_is_optax_schedule_free(rate):
    """The uniform average, in which both agree."""
    params, grads = problem()
    ours, state, last = run(
        averaging(optax.sgd(rate), "schedule_free", learning_rate=rate, train_coeff=0.9),
        params,
        grads,
    )
    theirs, other, _ = run(optax.contrib.schedule_free(optax.sgd(0.1), 0.1, b1=0.9), params, grads)
    for a, b in zip(ours, theirs, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6), a, b)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=3e-6),
        eval_params(state, last),
        optax.contrib.schedule_free_eval_params(other, last),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_parameters_keep_their_dtype_and_z_is_float32(kind):
    params = jnp.ones(4, jnp.bfloat16)
    tx = averaging(optax.sgd(1e-3), kind, learning_rate=1e-3)
    state = tx.init(params)
    assert state.inner_state.z.dtype == jnp.float32
    for _ in range(16):  # each step is half a rounding unit of bfloat16 at 1
        updates, state = tx.update(jnp.ones_like(params), state, params)
    assert updates.dtype == eval_params(state, params).dtype == jnp.bfloat16
    np.testing.assert_allclose(state.inner_state.z, 1 - 16e-3, rtol=1e-4)


def test_double_precision_is_kept():
    with jax.enable_x64(True):
        params, grads = problem(jnp.float64)
        tx = averaging(optax.sgd(0.125), "primal", learning_rate=0.125, eval_coeff=0.5)
        path, state, _ = run(tx, params, grads)
        z = wide(params)
        for g in grads:
            z = {k: z[k] - 0.125 * np.asarray(g[k]) for k in z}
        for k, value in z.items():
            assert state.inner_state.z[k].dtype == path[-1][k].dtype == np.float64
            np.testing.assert_allclose(state.inner_state.z[k], value, rtol=1e-13, atol=1e-14)


def test_state_is_arrays_of_stable_structure():
    params, grads = problem()
    for kind in KINDS:
        tx = averaging(optax.adam(0.1), kind, learning_rate=schedule)
        shapes = jax.eval_shape(tx.init, params)
        state = tx.init(params)
        _, after = tx.update(grads[0], state, params)
        assert jax.tree.structure(state) == jax.tree.structure(after) == jax.tree.structure(shapes)
        assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, after)
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves((state, after)))


def test_parameters_inside_the_state_are_found():
    params, _ = problem()
    tx = averaging(optax.adam(0.1), learning_rate=0.1)
    state = optax.tree.map_params(tx, lambda x: x + 1.0, tx.init(params))
    np.testing.assert_allclose(state.inner_state.z["w"], params["w"] + 1)
    assert int(state.inner_state.count) == 0


def test_injected_learning_rate_follows_its_value():
    def build(learning_rate, eval_coeff):
        inner = optax.sgd(learning_rate)
        return averaging(inner, learning_rate=learning_rate, eval_coeff=eval_coeff)

    params, grads = problem()
    tx = optax.inject_hyperparams(build)(learning_rate=0.3, eval_coeff=0.5)
    state = tx.init(params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.1)
    state.hyperparams["eval_coeff"] = jnp.asarray(0.75)
    _, state = jax.jit(tx.update)(grads[0], state, params)
    np.testing.assert_allclose(
        optax.tree.get(state, "z")["w"], params["w"] - 0.1 * grads[0]["w"], rtol=1e-6
    )
    jax.eval_shape(tx.init, params)


def test_evaluation_reaches_into_chains_and_partitions():
    params, grads = problem()
    one = averaging(optax.sgd(0.1), learning_rate=0.1)
    routed = optax.partition(
        {"matrix": averaging(optax.sgd(0.1), learning_rate=0.1), "rest": optax.sgd(0.5)},
        {"w": "matrix", "b": "rest"},
    )
    _, alone, last = run(one, params, grads)
    _, state, routed_last = run(optax.chain(optax.identity(), routed), params, grads)
    averaged = eval_params(state, routed_last)
    np.testing.assert_allclose(averaged["w"], eval_params(alone, last)["w"], rtol=1e-6)
    np.testing.assert_array_equal(averaged["b"], routed_last["b"])

    both = optax.partition({"matrix": one, "rest": one}, {"w": "matrix", "b": "rest"})
    _, state, last = run(both, params, grads)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
        eval_params(state, last),
        eval_params(alone, last),
    )


def test_masked_decay_spares_its_parameters():
    params, _ = problem()
    decay = optax.add_decayed_weights(0.5, {"w": True, "b": False})
    tx = averaging(optax.sgd(0.1), learning_rate=0.1, decay=decay)
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(state.inner_state.z["w"], 0.95 * params["w"], rtol=1e-6)
    np.testing.assert_array_equal(state.inner_state.z["b"], params["b"])


def test_extra_arguments_reach_the_wrapped_optimizer_and_the_decay():
    def update(updates, state, params=None, *, factor, **extra):
        del params, extra
        return jax.tree.map(lambda u: factor * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = averaging(inner, learning_rate=1.0, decay=inner)
    params = jnp.ones(2)
    _, state = tx.update(params, tx.init(params), params, factor=-3.0)
    np.testing.assert_allclose(state.inner_state.z, -2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_a_bad_gradient_has_not_been(kind):
    """Neither mixing, decay nor schedule go on, whether or not the wrapped optimizer skips too."""
    params, grads = problem()
    bad = {**grads[2], "b": grads[2]["b"].at[1].set(jnp.nan)}
    decay = decay_parts(0.7)[1][0]
    for inner in (optax.sgd(schedule), shampoo(schedule, every=2)):
        tx = averaging(inner, kind, learning_rate=schedule, decay=decay)
        path, state, last = run(tx, params, [*grads[:2], bad, *grads[2:4]])
        expected, other, _ = run(tx, params, grads[:4])
        jax.tree.map(np.testing.assert_array_equal, path[2], path[1])
        jax.tree.map(np.testing.assert_array_equal, [*path[:2], *path[3:]], expected)
        jax.tree.map(np.testing.assert_array_equal, state.inner_state, other.inner_state)
        assert int(state.inner_state.count) == 4
        with pytest.raises(FloatingPointError, match="1 step was skipped"):
            check_finite(state)
        assert jax.tree.all(jax.tree.map(lambda x: jnp.isfinite(x).all(), eval_params(state, last)))


@pytest.mark.parametrize("kind", KINDS)
def test_it_converges_on_an_ill_conditioned_quadratic(kind):
    scales = jnp.asarray([1.0, 0.03])
    tx = averaging(optax.sgd(1.0), kind, learning_rate=1.0)
    params = jnp.ones(2)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(400):
        updates, state = step(scales * params, state, params)
        params = optax.apply_updates(params, updates)
    x = eval_params(state, params)
    assert float(jnp.sum(scales * x**2)) < 1e-3 * float(jnp.sum(scales))


def test_bad_calls_are_named():
    params = jnp.ones(2)
    tx = averaging(optax.sgd(0.1), learning_rate=0.1)
    with pytest.raises(ValueError, match="averaging needs the parameters"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="no AveragingState"):
        eval_params(optax.sgd(0.1).init(params), params)
    assert isinstance(tx.init(params).inner_state, AveragingState)


def test_a_missing_gradient_leaves_its_iterates_alone():
    params, grads = problem()
    decay = optax.add_decayed_weights(0.5)
    tx = averaging(optax.adam(0.1), learning_rate=0.1, decay=decay)
    _, state = tx.update(grads[0], tx.init(params), params)
    updates, after = tx.update({"w": grads[1]["w"], "b": None}, state, params)
    full, expected = tx.update(grads[1], state, params)
    assert updates["b"] is None
    np.testing.assert_array_equal(updates["w"], full["w"])
    for kept in ("z", "mu"):
        now, old, new = (optax.tree.get(s, kept) for s in (after, state, expected))
        np.testing.assert_array_equal(now["b"], old["b"])
        np.testing.assert_array_equal(now["w"], new["w"])


def test_a_vmapped_state_is_evaluated_under_vmap():
    tx = averaging(optax.sgd(1.0), learning_rate=1.0)
    params = {"w": jnp.arange(4.0).reshape(2, 2), "b": jnp.ones((2, 3))}
    _, state = jax.vmap(tx.update)(params, jax.vmap(tx.init)(params), params)
    with pytest.raises(ValueError, match=r"as vmap makes them: map over both, jax\.vmap\(eval_par"):
        eval_params(state, params)
    both = jax.vmap(eval_params)(state, params)
    for k in range(2):
        one, mean = jax.tree.map(lambda x, k=k: x[k], ((state, params), both))
        jax.tree.map(np.testing.assert_array_equal, eval_params(*one), mean)
