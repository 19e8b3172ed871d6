"""Gradients that are missing, narrow or not finite."""

import functools
import operator

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj
from shampoo_jax.stacks.guard import in_float32, unguarded

rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


# Two matrices share a stack, a third has its own, and two parameters go to AdamW.
PARAMS, *GRADIENTS = (
    {"a": normal(3, 3), "b": normal(3, 3), "c": normal(2, 2), "embed": normal(2, 2), "v": normal(2)}
    for _ in range(4)
)


def run(tx, gradients, params=PARAMS):
    """Updates and states of every step at constant parameters, without jit."""
    with jax.disable_jit():
        states, updates = [tx.init(params)], []
        for g in gradients:
            new, state = tx.update(g, states[-1], params)
            updates.append(new)
            states.append(state)
    return updates, states


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def without(gradients, *names):
    return {k: None if k in names else g for k, g in gradients.items()}


shampoo = functools.partial(sj.shampoo, 0.1, b2=0.8, weight_decay=0.1, momentum=0.5)
OPTIMIZERS = {
    "scale_by_shampoo": lambda: sj.scale_by_shampoo(b2=0.8, every=2),
    "scale_by_kl_soap": lambda: sj.scale_by_kl_soap(b2=0.8, every=2),
    "shampoo": shampoo,
    "shampoo l2": functools.partial(shampoo, decay=sj.Decay("l2")),
    "soap": functools.partial(sj.soap, 0.1, weight_decay=0.1),
}
CASES = [(o, n) for o in OPTIMIZERS for n in ("a", "v") if n == "a" or "scale_by" not in o]


@functools.cache
def complete(optimizer):
    return run(OPTIMIZERS[optimizer](), GRADIENTS[:3])


@functools.cache
def owned(optimizer, name):
    """Which entries of an optimizer state are about one parameter.

    Found by trying: those that differ when only this parameter's first gradient does.
    """
    changed = {**GRADIENTS[0], name: 2.0 - GRADIENTS[0][name]}
    _, (*_, state) = run(OPTIMIZERS[optimizer](), [changed, *GRADIENTS[1:3]])
    return jax.tree.map(operator.ne, state, complete(optimizer)[1][-1])


def state_of(state, optimizer, name):
    mine = owned(optimizer, name)
    return [x[m] for x, m in zip(jax.tree.leaves(state), jax.tree.leaves(mine), strict=True)]


@pytest.mark.parametrize(("optimizer", "name"), CASES)
def test_a_missing_gradient_leaves_its_parameter_and_its_state_alone(optimizer, name):
    tx = OPTIMIZERS[optimizer]()
    updates, states = run(tx, [GRADIENTS[0], without(GRADIENTS[1], name), GRADIENTS[2]])
    expected_updates, expected_states = complete(optimizer)
    # The parameter: no update, no decay, nothing kept for later.
    assert updates[1][name] is None
    before, after = (state_of(s, optimizer, name) for s in states[1:3])
    assert sum(x.size for x in before) >= PARAMS[name].size
    assert_equal(before, after)
    # The others do not notice, and the structure stays what it was.
    for new, expected in zip(updates, expected_updates, strict=True):
        for other in PARAMS.keys() - {name}:
            np.testing.assert_array_equal(new[other], expected[other])
    assert jax.tree.structure(states[2]) == jax.tree.structure(states[1])
    # Counts advance for all alike, so the parameter goes on as after a step that did not count.
    counts = [
        [x for x in jax.tree.leaves(s) if x.ndim == 0] for s in (states[2], expected_states[2])
    ]
    assert_equal(*counts)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))
    assert (updates[2][name] != expected_updates[2][name]).any()


def test_a_missing_gradient_in_formulas():
    """The missed step counts in AdamW's bias correction, not in its moments, as in golden 50."""
    tx = sj.shampoo(0.1, others=optax.adamw(0.1, 0.9, 0.8, 0.0, weight_decay=0.0))
    gradients = [GRADIENTS[0], without(GRADIENTS[1], "v"), GRADIENTS[2]]
    (_, _, update), _ = run(tx, gradients)
    first, third = np.asarray(GRADIENTS[0]["v"]), np.asarray(GRADIENTS[2]["v"])
    mu = (0.9 * 0.1 * first + 0.1 * third) / (1 - 0.9**3)
    nu = (0.8 * 0.2 * first**2 + 0.2 * third**2) / (1 - 0.8**3)
    np.testing.assert_allclose(update["v"], -0.1 * mu / np.sqrt(nu), rtol=1e-5)


def test_all_gradients_missing():
    nothing = dict.fromkeys(PARAMS)
    updates, states = run(shampoo(), [GRADIENTS[0], nothing])
    assert updates[1] == nothing
    for new, old in zip(*map(jax.tree.leaves, states[:0:-1]), strict=True):
        if new.ndim:
            np.testing.assert_array_equal(new, old)


def test_a_missing_gradient_needs_parameters():
    tx = sj.scale_by_shampoo()
    with pytest.raises(ValueError, match=r"4 gradients for 5 parameters: .*pass the parameters"):
        tx.update(without(GRADIENTS[0], "a"), tx.init(PARAMS))


OLD = {"a": {"w": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
GROWN = {
    "a matrix more": OLD | {"b": {"w": jnp.ones((4, 3))}},
    "a vector more": OLD | {"b": {"bias": jnp.ones(4)}},
    "no vector": {"a": {"w": jnp.ones((4, 3))}},
    "no matrix": {"a": {"bias": jnp.zeros(3)}},
    "other matrix": {"a": {"w": jnp.ones((5, 3)), "bias": jnp.zeros(3)}},
    "longer vector": {"a": {"w": jnp.ones((4, 3)), "bias": jnp.zeros(7)}},
    "vector of one": {"a": {"w": jnp.ones((4, 3)), "bias": jnp.zeros(1)}},  # which broadcasts
    "other names": {"c": OLD["a"]},
    "a tuple": tuple(OLD["a"].values()),
}


@pytest.mark.parametrize("change", GROWN)
@pytest.mark.parametrize("direction", [True, False])
def test_a_state_of_other_parameters_is_refused(change, direction):
    if direction and change in ("other names", "a tuple"):
        return  # stacks have no names: `check_state` compares those
    tx = sj.scale_by_kl_shampoo() if direction else sj.soap(0.1, momentum=0.9)
    state, params = jax.eval_shape(tx.init, OLD), GROWN[change]
    for given in ((params,), ()) if direction else ((params,),):
        with pytest.raises(ValueError, match="state belongs to other parameters.*: init again, or"):
            jax.eval_shape(tx.update, params, state, *given)


def test_errors_of_parts_stay_what_they_are():
    def update(updates, state, params=None):
        raise KeyError("mine")

    tx = sj.guard(optax.GradientTransformation(lambda params: optax.EmptyState(), update))
    with pytest.raises(KeyError, match="mine"):
        tx.update(OLD, tx.init(OLD), OLD)


def test_missing_gradients_trace_once_for_each_pattern():
    tx, traces = shampoo(), []

    def step(g, state):
        traces.append(None)
        return jax.eval_shape(tx.update, g, state, PARAMS)

    step = jax.jit(step).trace
    state = jax.eval_shape(tx.init, PARAMS)
    for g in (GRADIENTS[0], without(GRADIENTS[0], "a"), GRADIENTS[1], without(GRADIENTS[1], "a")):
        step(g, state)
    assert len(traces) == 2


def test_equinox_like_trees():
    """None in parameters is no parameter; None in gradients alone is a missing gradient."""
    static = {**PARAMS, "activation": None, "layers": [None, normal(2, 3)]}
    gradient = {**GRADIENTS[0], "activation": None, "layers": [None, normal(2, 3)]}
    updates, _ = run(shampoo(), [gradient, without(gradient, "activation", "a")], static)
    assert updates[0]["activation"] is None and updates[0]["layers"][0] is None
    assert updates[0]["layers"][1].shape == (2, 3)
    expected, _ = run(shampoo(), [GRADIENTS[0], without(GRADIENTS[0], "a")])
    for new, old in zip(updates, expected, strict=True):
        for name in PARAMS:
            assert_equal(new[name], old[name])


BAD = {
    "nan": lambda x: x.at[0].set(jnp.nan),
    "inf": lambda x: x.at[-1].set(jnp.inf),
    "all": lambda x: jnp.full_like(x, -jnp.inf),
    "overflow": lambda x: x.at[0].set(1e25),  # finite, but its square is not
}


BARE = {
    "blocked": lambda: sj.blocked(sj.filter_gradient(0.9), blocking=sj.Blocking(2)),
    "scale_by_shampoo": OPTIMIZERS["scale_by_shampoo"],
    "scale_by_kl_soap": OPTIMIZERS["scale_by_kl_soap"],
    "shampoo": shampoo,
    "averaging": lambda: sj.averaging(shampoo(), learning_rate=0.1),
}


@functools.cache
def without_the_second_step(optimizer):
    return run(BARE[optimizer](), [GRADIENTS[0], *GRADIENTS[2:]])[0]


@pytest.mark.parametrize("optimizer", BARE)
@pytest.mark.parametrize(
    ("name", "bad"),
    [("a", "nan"), ("a", "overflow"), ("v", "inf"), ("v", "all"), ("v", "overflow")],
)
def test_one_bad_gradient_skips_the_whole_step(optimizer, name, bad):
    tx = BARE[optimizer]()
    spoiled = {**GRADIENTS[1], name: BAD[bad](GRADIENTS[1][name])}
    updates, states = run(tx, [GRADIENTS[0], spoiled, spoiled, *GRADIENTS[2:]])
    assert all((x == 0).all() for u in updates[1:3] for x in jax.tree.leaves(u))
    assert int(states[3].total_notfinite) == int(states[3].notfinite_count) == 2
    assert_equal(states[3].inner_state, states[1].inner_state)
    assert int(states[4].total_notfinite) == 2 and int(states[4].notfinite_count) == 0
    # As if the steps had not been.
    assert_equal(updates[3:], without_the_second_step(optimizer)[1:])


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_block_freezes_all_of_its_matrix_and_of_the_others(bad):
    """A matrix of four blocks with one bad entry, beside a good one: the step is skipped whole."""
    tx = sj.scale_by_soap(blocking=sj.Blocking(2), every=2)
    params, good, spoiled = ({"w": normal(4, 4), "x": normal(2, 2)} for _ in range(3))
    spoiled["w"] = spoiled["w"].at[:2, 2:].set(BAD[bad](spoiled["w"][:2, 2:]))
    updates, states = run(tx, [good, spoiled], params)
    assert all((x == 0).all() for x in jax.tree.leaves(updates[1]))
    assert_equal(states[2].inner_state, states[1].inner_state)


def test_both_missing_and_bad():
    """A gradient that is missing hides no other that is not finite."""
    spoiled = {**without(GRADIENTS[1], "a"), "b": BAD["nan"](GRADIENTS[1]["b"])}
    updates, states = run(shampoo(), [GRADIENTS[0], spoiled])
    assert updates[1]["a"] is None and all((x == 0).all() for x in jax.tree.leaves(updates[1]))
    assert_equal(states[2].inner_state, states[1].inner_state)


def test_the_check_of_a_step_copies_no_gradient():
    gradient = jax.ShapeDtypeStruct((1 << 16,), jnp.float32)
    tx = sj.guard(optax.sgd(0.1))
    state = jax.eval_shape(tx.init, gradient)
    step = jax.jit(tx.update).lower(gradient, state).compile()
    assert step.memory_analysis().temp_size_in_bytes < 4 * gradient.size / 2


def test_the_optimizer_inside_is_not_guarded():
    tx = unguarded(shampoo())
    assert unguarded(tx) is tx
    updates, _ = run(tx, [{**GRADIENTS[0], "a": BAD["nan"](GRADIENTS[0]["a"])}])
    assert jnp.isnan(updates[0]["a"]).any() and jnp.isfinite(updates[0]["b"]).all()


def test_a_step_outside_of_jit_is_one_program():
    """A Python side effect inside of it happens once for each structure, not once a step."""
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(extra)
        return updates, state

    tx = sj.guard(optax.GradientTransformationExtraArgs(lambda params: None, update))
    state = tx.init(PARAMS)
    for g in GRADIENTS:
        tx.update(g, state, PARAMS)
    assert len(seen) == 1
    tx.update(GRADIENTS[0], state, PARAMS, value=jnp.array(1.0))
    assert len(seen) == 2 and seen[-1].keys() == {"value"}
    # A function cannot be traced: the step runs as it is written.
    tx.update(GRADIENTS[0], state, PARAMS, value_fn=jnp.sum)
    assert seen[-1]["value_fn"] is jnp.sum


@pytest.mark.parametrize("wrap", [sj.guard, in_float32])
def test_narrow_gradients_are_computed_wide_and_come_back_narrow(wrap):
    tx = wrap(optax.chain(optax.trace(0.9), optax.scale(jnp.array(0.1))))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    updates, state = tx.update(narrow, tx.init(narrow), narrow)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    moments = [x for x in jax.tree.leaves(state) if jnp.ndim(x)]
    assert {x.dtype for x in moments} == {jnp.dtype(jnp.float32)}
    for u, g in zip(*map(jax.tree.leaves, (updates, narrow)), strict=True):
        np.testing.assert_array_equal(u, (0.1 * g.astype(jnp.float32)).astype(jnp.bfloat16))


def test_bfloat16_is_rounded_once_and_states_are_float32():
    tx = in_float32(optax.chain(optax.add_decayed_weights(0.3), optax.trace(0.9)))
    params = jnp.asarray(rng.normal(size=50), jnp.bfloat16)
    grads = [jnp.asarray(rng.normal(size=50), jnp.bfloat16) for _ in range(6)]
    state = tx.init(params)
    trace = np.zeros(50)
    for g in grads:
        updates, state = tx.update(g, state, params)
        trace = 0.9 * trace + np.asarray(g, np.float64) + 0.3 * np.asarray(params, np.float64)
        assert updates.dtype == jnp.bfloat16
        assert optax.tree.get(state, "trace").dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(updates, np.float64), trace, rtol=2.0**-8)
    np.testing.assert_allclose(optax.tree.get(state, "trace"), trace, rtol=1e-5, atol=1e-6)


def test_array_hyperparameters_leave_dtypes_of_a_mixed_tree_alone():
    tx = in_float32(optax.trace(jnp.asarray(0.9)))
    params = {"wide": jnp.ones(3), "narrow": jnp.ones(2, jnp.bfloat16)}
    state = tx.init(params)
    updates, after = tx.update(params, state)
    dtypes = jax.tree.map(jnp.result_type, (params, state))
    assert jax.tree.map(jnp.result_type, (updates, after)) == dtypes


def test_double_precision_is_not_narrowed():
    with jax.enable_x64(True):
        tx = in_float32(optax.trace(0.9))
        params = jnp.asarray([1.0, 1e-12]) + 1
        updates, state = tx.update(params, tx.init(params))
        assert updates.dtype == optax.tree.get(state, "trace").dtype == jnp.float64
        np.testing.assert_array_equal(updates, params)


@pytest.mark.parametrize(
    ("gradients", "complaint"),
    [
        ({**PARAMS, "a": normal(3, 2)}, r"'a' has shape \(3, 3\), its gradient \(3, 2\)"),
        ({k: x for k, x in PARAMS.items() if k != "a"}, r"'a' has shape .*its gradient None"),
        ({**PARAMS, "z": normal(2)}, r"'z' has shape None, its gradient \(2,\)"),
    ],
)
def test_gradients_of_another_tree_are_refused(gradients, complaint):
    tx = sj.scale_by_shampoo()
    with pytest.raises(ValueError, match=complaint):
        tx.update(gradients, tx.init(PARAMS), PARAMS)


def assert_only_the_first_is_frozen(before, after, params):
    """Momentum of w as it was, that of z/w as after another step with the same gradient."""
    np.testing.assert_array_equal(after["w"], before["w"])
    np.testing.assert_allclose(after["z"]["w"], 1.9 * params["z"]["w"], rtol=1e-6)


ALIKE = {"w": normal(3), "z": {"w": normal(3)}}


def test_a_missing_gradient_leaves_longer_paths_with_the_same_end_alone():
    tx = sj.guard(optax.trace(0.9))
    _, before = tx.update(ALIKE, tx.init(ALIKE), ALIKE)
    new, after = tx.update({**ALIKE, "w": None}, before, ALIKE)
    assert new["w"] is None
    before, after = before.inner_state.trace, after.inner_state.trace
    assert_only_the_first_is_frozen(before, after, ALIKE)


class TestCheckFinite:
    spoiled = {k: BAD["nan"](g) for k, g in GRADIENTS[0].items()}

    def test_it_says_how_much_was_skipped(self):
        tx = optax.chain(optax.identity(), shampoo())
        _, states = run(tx, [*GRADIENTS[:1], self.spoiled, self.spoiled])
        sj.check_finite(states[1])
        with pytest.raises(FloatingPointError, match="1 step was skipped"):
            sj.check_finite(states[2])
        with pytest.raises(FloatingPointError, match="2 steps were skipped"):
            sj.check_finite(states[3])

    def test_wrappers_within_wrappers_are_read(self):
        tx = optax.apply_if_finite(sj.scale_by_shampoo(), 0)
        bad = {**GRADIENTS[0], "a": self.spoiled["a"]}
        _, states = run(tx, [bad])  # it gives up at once and hands the gradients on
        assert_equal(states[1].inner_state.inner_state, states[0].inner_state.inner_state)
        with pytest.raises(FloatingPointError, match="2 steps were"):  # counted by both
            sj.check_finite(states[1])

    def test_directions_and_blocked_count_by_themselves(self):
        for name in ("blocked", "scale_by_shampoo", "averaging"):
            _, states = run(BARE[name](), [self.spoiled])
            with pytest.raises(FloatingPointError, match="1 step was"):
                sj.check_finite(states[1])

    def test_nnx(self):
        model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, sj.shampoo(0.1), wrt=nnx.Param)
        sj.check_finite(optimizer.opt_state)
        bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), nnx.state(model, nnx.Param))
        with jax.disable_jit():
            optimizer.update(model, bad)
        with pytest.raises(FloatingPointError, match="1 step was"):
            sj.check_finite(optimizer.opt_state)

    def test_a_state_that_counts_nothing_is_refused(self):
        with pytest.raises(ValueError, match="counts no skipped gradients: use .*apply_if_finite"):
            sj.check_finite(optax.adam(0.1).init(PARAMS))


def test_a_state_is_made_of_shapes():
    params = {
        "w": jax.ShapeDtypeStruct((3, 2), jnp.bfloat16),
        "b": jax.ShapeDtypeStruct((2,), jnp.float32),
    }
    arrays = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), params)
    parts = (sj.filter_gradient(), sj.scale_by_second_moment(), sj.accumulate_factors())
    for tx in (sj.shampoo(0.1), sj.soap(0.1), sj.scale_by_kl_shampoo(), *parts):
        made, wanted = tx.init(params), tx.init(arrays)
        assert jax.tree.structure(made) == jax.tree.structure(wanted)
        for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(a, b)


def test_leaves_that_are_no_arrays_are_passed_by():
    # As in a whole Equinox module, whose activation is a leaf without gradient.
    tx, weights = sj.shampoo(0.1), {"w": jnp.ones((3, 2)), "activation": None}
    grads, state = {"w": jnp.eye(3, 2), "activation": None}, tx.init(weights)
    wanted, _ = tx.update(grads, state, weights)
    got, _ = tx.update(grads, state, {"w": jnp.ones((3, 2)), "activation": jax.nn.relu})
    np.testing.assert_array_equal(got["w"], wanted["w"])
    assert got["activation"] is None
