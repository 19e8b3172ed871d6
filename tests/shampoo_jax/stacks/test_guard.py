"""Gradients that are missing, not finite, or on another scale."""

import functools
import operator

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shampoo_jax as sj
from shampoo_jax.stacks.guard import skip_nonfinite_steps

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


def assert_close(a, b, rtol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * float(jnp.abs(y).max()))


def without(gradients, *names):
    return {k: None if k in names else g for k, g in gradients.items()}


shampoo = functools.partial(sj.shampoo, 0.1, b2=0.8, weight_decay=0.1, momentum=0.5)
OPTIMIZERS = {
    "scale_by_shampoo": lambda: sj.scale_by_shampoo(b2=0.8, every=2),
    "scale_by_kl_soap": lambda: sj.scale_by_kl_soap(b2=0.8, every=2),
    "shampoo": shampoo,
    "shampoo l2": functools.partial(shampoo, weight_decay_kind="l2"),
    "soap": functools.partial(sj.soap, 0.1, weight_decay=0.1, nonfinite="skip_blocks"),
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
    tx = sj.shampoo(0.1, adamw_b1=0.9, adamw_b2=0.8, adamw_eps=0.0)
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


@functools.cache
def without_the_second_step():
    return run(shampoo(), [GRADIENTS[0], *GRADIENTS[2:]])[0]


@pytest.mark.parametrize(
    ("name", "bad"),
    [("a", "nan"), ("a", "overflow"), ("v", "inf"), ("v", "all"), ("v", "overflow")],
)
def test_one_bad_gradient_skips_the_whole_step(name, bad):
    tx = shampoo()
    spoiled = {**GRADIENTS[1], name: BAD[bad](GRADIENTS[1][name])}
    updates, states = run(tx, [GRADIENTS[0], spoiled, spoiled, *GRADIENTS[2:]])
    assert all((x == 0).all() for u in updates[1:3] for x in jax.tree.leaves(u))
    assert int(states[3].total_notfinite) == 2
    assert_equal(states[3].inner_state, states[1].inner_state)
    # As if the steps had not been.
    assert_equal(updates[3:], without_the_second_step()[1:])


def test_the_check_of_a_step_copies_no_gradient():
    gradient = jax.ShapeDtypeStruct((1 << 16,), jnp.float32)
    tx = skip_nonfinite_steps(optax.sgd(0.1))
    state = jax.eval_shape(tx.init, gradient)
    step = jax.jit(tx.update).lower(gradient, state).compile()
    assert step.memory_analysis().temp_size_in_bytes < 4 * gradient.size / 2


def test_propagate_is_the_bare_optimizer():
    tx = shampoo(nonfinite="propagate")
    updates, _ = run(tx, [{**GRADIENTS[0], "a": BAD["nan"](GRADIENTS[0]["a"])}])
    assert jnp.isnan(updates[0]["a"]).any() and jnp.isfinite(updates[0]["b"]).all()


@pytest.mark.parametrize(
    ("optimizer", "bad"),
    [
        *(("scale_by_shampoo", "nan"), ("scale_by_soap", "inf"), ("scale_by_kl_shampoo", "all")),
        *((f"scale_by_{name}", "overflow") for name in ("shampoo", "soap", "kl_shampoo")),
    ],
)
def test_only_the_blocks_that_are_affected_are_skipped(optimizer, bad):
    """A matrix of four blocks with one bad entry, beside a good one: bit for bit, without jit."""
    tx = getattr(sj, optimizer)(block_size=2, nonfinite="skip_blocks", every=2)
    params, *gradients = ({"w": normal(4, 4), "x": normal(2, 2)} for _ in range(5))
    spoiled = dict(gradients[2])
    spoiled["w"] = spoiled["w"].at[:2, 2:].set(BAD[bad](spoiled["w"][:2, 2:]))
    clean, (*_, clean_state) = run(tx, gradients, params)
    sick = [*gradients[:2], spoiled, gradients[3]]
    updates, states = run(tx, sick, params)
    for t, (new, expected) in enumerate(zip(updates, clean, strict=True)):
        same = np.asarray(new["w"] == expected["w"])
        np.testing.assert_array_equal(new["x"], expected["x"])
        assert same[2:].all() and same[:, :2].all()
        assert same[:2, 2:].all() == (t < 2)
    assert (updates[2]["w"][:2, 2:] == 0).all()
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((updates, states)))
    # Four blocks of w in rows, then x: only the second differs, and was not touched in step 3.
    inner = [s.inner.inner for s in (states[2], states[3], clean_state, states[4])]
    for before, after, expected, last in zip(*map(jax.tree.leaves, inner), strict=True):
        if before.ndim:
            np.testing.assert_array_equal(before[1], after[1])
            rest = np.array([0, 2, 3, 4])
            np.testing.assert_array_equal(last[rest], expected[rest])
    np.testing.assert_array_equal(states[4].inner.skipped["2x2"], [0, 1, 0, 0, 0])


def test_skipping_blocks_reaches_the_parameters_of_adamw():
    tx = OPTIMIZERS["soap"]()
    names = ("b", "v")
    spoiled = {k: BAD["nan"](g) if k in names else g for k, g in GRADIENTS[1].items()}
    updates, states = run(tx, [GRADIENTS[0], spoiled, GRADIENTS[2]])
    clean, _ = complete("soap")
    for new, expected in zip(updates, clean, strict=True):
        for name in PARAMS.keys() - set(names):
            np.testing.assert_array_equal(new[name], expected[name])
    assert (updates[1]["v"] == 0).all()  # no decay either
    # Matrices go on decaying: their direction alone is zero.
    np.testing.assert_allclose(updates[1]["b"], -0.01 * PARAMS["b"], rtol=1e-6)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((updates, states)))
    before, after = (state_of(s, "soap", "v") for s in states[1:3])
    assert sum(x.size for x in before) == 2 * 2  # mu and nu
    assert_equal(before, after)


def assert_only_the_first_is_frozen(before, after, params):
    """Momentum of w as it was, that of z/w as after another step with the same gradient."""
    np.testing.assert_array_equal(after["w"], before["w"])
    np.testing.assert_allclose(after["z"]["w"], 1.9 * params["z"]["w"], rtol=1e-6)


ALIKE = {"w": normal(3), "z": {"w": normal(3)}}


def test_a_missing_gradient_leaves_longer_paths_with_the_same_end_alone():
    tx = sj.accept_missing(optax.trace(0.9))
    _, before = tx.update(ALIKE, tx.init(ALIKE), ALIKE)
    new, after = tx.update({**ALIKE, "w": None}, before, ALIKE)
    assert new["w"] is None
    assert_only_the_first_is_frozen(before.trace, after.trace, ALIKE)


def test_a_bad_gradient_leaves_longer_paths_with_the_same_end_alone():
    tx = sj.skip_nonfinite_parameters(optax.trace(0.9))
    _, before = tx.update(ALIKE, tx.init(ALIKE), ALIKE)
    new, after = tx.update({**ALIKE, "w": BAD["nan"](ALIKE["w"])}, before, ALIKE)
    assert (new["w"] == 0).all()
    assert_only_the_first_is_frozen(before.inner.trace, after.inner.trace, ALIKE)


PACKS = {"tuple": lambda a, b: (a, b), "nested": lambda a, b: {"w": a, "z": {"w": b}}}


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("pack", PACKS)
def test_skipping_blocks_alone_on_a_plain_tree(pack, bad):
    """Paths in a tuple look like positions in the chain, and `w` is the end of `z/w`."""
    tx = sj.skip_nonfinite_blocks(optax.chain(sj.filter_gradient(0.9), sj.accumulate_factors(0.8)))
    good = [normal(3, 3), normal(3, 3)]
    spoiled = list(good)
    spoiled[bad] = BAD["nan"](good[bad])
    updates, states = run(tx, [PACKS[pack](*good), PACKS[pack](*spoiled)], PACKS[pack](*good))
    assert [bool((u == 0).all()) for u in jax.tree.leaves(updates[1])] == [bad == 0, bad == 1]
    (old_filter, old), (new_filter, new) = (s.inner for s in states[1:])
    same = lambda a, b: [  # noqa: E731
        bool((x == y).all()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    ]
    frozen = [bad == 0, bad == 1]
    assert same(old_filter.mu, new_filter.mu) == frozen
    assert same(old.factors, new.factors) == [f for f in frozen for _ in range(2)]
    assert [int(n[0]) for n in jax.tree.leaves(states[2].skipped)] == frozen


class TestCheckFinite:
    spoiled = {k: BAD["nan"](g) for k, g in GRADIENTS[0].items()}

    @pytest.mark.parametrize(
        ("nonfinite", "message"),
        [("skip", "2 steps and 0 blocks"), ("skip_blocks", "0 steps and 10 blocks")],
    )
    def test_it_says_how_much_was_skipped(self, nonfinite, message):
        tx = optax.chain(optax.identity(), shampoo(nonfinite=nonfinite))
        _, states = run(tx, [*GRADIENTS[:1], self.spoiled, self.spoiled])
        sj.check_finite(states[1])
        with pytest.raises(FloatingPointError, match=message):
            sj.check_finite(states[3])

    def test_wrappers_within_wrappers_are_read(self):
        tx = optax.apply_if_finite(sj.scale_by_shampoo(nonfinite="skip_blocks"), 0)
        bad = {**GRADIENTS[0], "a": self.spoiled["a"]}
        _, states = run(tx, [bad])  # it gives up at once and hands the gradients on
        with pytest.raises(FloatingPointError, match="1 step and 1 block were"):
            sj.check_finite(states[1])

    def test_nnx(self):
        model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, sj.shampoo(0.1), wrt=nnx.Param)
        sj.check_finite(optimizer.opt_state)
        bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), nnx.state(model, nnx.Param))
        with jax.disable_jit():
            optimizer.update(model, bad)
        with pytest.raises(FloatingPointError, match="1 step and 0 blocks"):
            sj.check_finite(optimizer.opt_state)

    def test_a_state_that_counts_nothing_is_refused(self):
        with pytest.raises(ValueError, match="counts no skipped gradients: build .*nonfinite="):
            sj.check_finite(sj.scale_by_shampoo().init(PARAMS))


@functools.cache
def training(optimizer):
    tx = OPTIMIZERS[optimizer]()

    @jax.jit
    def train(params, gradients, factor):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda x: x * factor, g), state, params)
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(step, (params, tx.init(params)), gradients)[1]

    return train


def drawn(seed, size, spread=1.0, shift=0.0):
    """Four steps of gradients; with a shift matrices have singular values near 1 to 10 shifts."""
    draw = np.random.default_rng(seed)

    def one(p):
        center = np.diag(np.geomspace(1, 10, len(p))) if p.ndim == 2 else 1.0
        gradient = spread * draw.normal(size=(4, *p.shape)) + shift * center
        return jnp.asarray(size * gradient, jnp.float32)

    return jax.tree.map(one, PARAMS)


def assert_scale_does_not_matter(gradients, factor, rtol):
    train = training("shampoo")
    assert_close(train(PARAMS, gradients, factor), train(PARAMS, gradients, 1.0), rtol)


SEEDS, SIZES = st.integers(0, 2**32 - 1), st.floats(1e-2, 1e2)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=SEEDS, exponent=st.integers(-20, 20), size=SIZES)
def test_a_scale_that_rounds_nothing_changes_nothing(seed, exponent, size):
    """Neither direction nor decay nor the parameters of AdamW."""
    assert_scale_does_not_matter(drawn(seed, size), 2.0**exponent, 1e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=SEEDS, factor=st.sampled_from([1e-6, 1e6]) | st.floats(1e-6, 1e6), size=SIZES)
def test_any_scale_changes_nothing_beyond_rounding(seed, factor, size):
    """Rounding counts as often as the factors' condition number, which is about 100 here."""
    assert_scale_does_not_matter(drawn(seed, size, spread=0.1, shift=1.0), factor, 2e-4)


def test_the_scale_property_can_fail():
    tx = sj.shampoo(0.1, graft_eps=1e-2, adamw_eps=1e-2)
    one, _ = run(tx, GRADIENTS)
    million, _ = run(tx, [jax.tree.map(lambda x: x * 1e6, g) for g in GRADIENTS])
    with pytest.raises(AssertionError):
        assert_close(million, one, 1e-3)


def test_sum_and_mean_reduced_losses_train_alike():
    inputs, target = normal(64, 3), normal(64, 2)
    params = {"dense": {"kernel": normal(3, 2), "bias": normal(2)}}

    def trained(reduce):
        tx = sj.shampoo(optax.linear_schedule(0.1, 0.0, 30), weight_decay=0.01)

        def loss(p):
            error = inputs @ p["dense"]["kernel"] + p["dense"]["bias"] - target
            return reduce(error**2)

        @jax.jit
        def train(params):
            def step(carry, _):
                params, state = carry
                updates, state = tx.update(jax.grad(loss)(params), state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, tx.init(params)), None, 30)[0][0]

        return train(params)

    assert_close(trained(jnp.sum), trained(jnp.mean), 1e-3)
