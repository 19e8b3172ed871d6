"""States regrouped by parameter: exact, and at home in a model whose parameters moved."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import shampoo_jax
from shampoo_jax import (
    FORMAT,
    Blocking,
    DimensionNumbers,
    as_optimizer,
    averaging,
    blocked,
    check_state,
    filter_gradient,
    kl_shampoo,
    scale_by_shampoo,
    scale_by_soap,
    shampoo,
    state_layout,
    state_to_tree,
    tree_to_state,
)
from shampoo_jax.stacks.blocked import BlockedState

PARAMS = {
    "layers": [{"w": jnp.ones((6, 4)), "bias": jnp.zeros(6)} for _ in range(2)],
    "fc": {"w": jnp.ones((4, 10))},
    "bias": jnp.ones(()),
}


def is_blocked(x):
    return isinstance(x, BlockedState)


def filled(state, seed=0):
    """The state as if after training: every array random, layouts as they are."""
    rng = np.random.default_rng(seed)

    def fill(x):
        return jnp.asarray(rng.integers(0, 100, jnp.shape(x)), x.dtype)

    return jax.tree.map(
        lambda x: x._replace(inner=jax.tree.map(fill, x.inner)) if is_blocked(x) else fill(x),
        state,
        is_leaf=is_blocked,
    )


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


OPTIMIZERS = {
    "direction": scale_by_shampoo(blocking=Blocking(6), every=2),
    "soap": scale_by_soap(rtol=None, graft="adam", monitor=2),
    "kl with momentum": kl_shampoo(0.1, blocking=Blocking(4), momentum=0.9),
    "alias": shampoo(0.1, blocking=Blocking(6), weight_decay=0.1, monitor=1),
    "parts of one's own": blocked(filter_gradient(0.9), blocking=Blocking(5)),
    "others of one's own": as_optimizer(scale_by_soap(), 0.1, others=optax.sgd(0.1, momentum=0.9)),
    "accumulated": optax.MultiSteps(shampoo(0.1), 2),
    "injected": optax.inject_hyperparams(lambda learning_rate: shampoo(learning_rate))(0.1),
    "averaged": averaging(shampoo(0.1), learning_rate=0.1),
    "two directions": optax.chain(scale_by_shampoo(), scale_by_shampoo(blocking=Blocking(3))),
}


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_round_trip_is_exact(tx):
    fresh = tx.init(PARAMS)
    state = filled(fresh)
    tree = state_to_tree(state, PARAMS)
    assert_equal(tree_to_state(tree, fresh, PARAMS), state)
    check_state(state, PARAMS, tx)
    check_state(state, PARAMS)


def test_entries_are_the_blocks_of_each_parameter():
    tx = scale_by_shampoo(blocking=Blocking(6), graft=None)
    state = filled(tx.init(PARAMS))
    tree = state_to_tree(state, PARAMS)
    mu = state.inner_state.inner[0].mu
    # Leaves in order: bias, fc/w (4x6 and 4x4, stored 6x4 and 4x4), layers/0/bias, layers/0/w, ...
    by_name = tree["parameters"]
    np.testing.assert_array_equal(by_name["fc/w"]["inner_state/inner/0/mu/6x4"], mu["6x4"][:1])
    np.testing.assert_array_equal(by_name["fc/w"]["inner_state/inner/0/mu/4x4"], mu["4x4"])
    np.testing.assert_array_equal(
        by_name["layers/1/w"]["inner_state/inner/0/mu/6x4"], mu["6x4"][2:]
    )
    np.testing.assert_array_equal(by_name["layers/1/bias"]["inner_state/inner/0/mu/6"], mu["6"][1:])
    cut = filled(scale_by_shampoo(blocking=Blocking(3)).init(PARAMS))
    entry = state_to_tree(cut, PARAMS)["parameters"]["layers/1/w"]
    np.testing.assert_array_equal(
        entry["inner_state/inner/0/mu/3x3"], cut.inner_state.inner[0].mu["3x3"][-2:]
    )
    assert sorted(tree["shared"]) == [
        "inner_state/inner/0/count",
        "inner_state/inner/1/0/count",
        "inner_state/inner/1/1/count",
        "last_finite",
        "notfinite_count",
        "total_notfinite",
    ]


def test_state_of_adamw_belongs_to_its_parameter():
    state = filled(shampoo(0.1).init(PARAMS))
    entry = state_to_tree(state, PARAMS)["parameters"]["layers/1/bias"]
    adam = state.inner_state.inner_states["others"].inner_state[0]
    moments = [x for key, x in entry.items() if key.endswith("/mu")]
    np.testing.assert_array_equal(moments, [adam.mu["layers"][1]["bias"]])


def grown(params, shape=(6, 4)):
    """The parameters with one more in front, which shares a stack with old ones."""
    return {"adapter": {"bias": jnp.ones(6), "w": jnp.ones(shape)}, **params}


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_parameters_may_be_added_in_front(tx):
    state, fresh = filled(tx.init(PARAMS)), filled(tx.init(grown(PARAMS)), seed=1)
    tree = state_to_tree(state, PARAMS)
    moved = tree_to_state(tree, fresh, grown(PARAMS))
    after = state_to_tree(moved, grown(PARAMS))
    untouched = state_to_tree(fresh, grown(PARAMS))
    for name, entry in after["parameters"].items():
        expected = (untouched if name.startswith("adapter") else tree)["parameters"][name]
        assert_equal(entry, expected)
    assert_equal(after["shared"], tree["shared"])
    check_state(moved, grown(PARAMS), tx)


def test_parameters_may_be_reordered_renamed_and_removed():
    tx = shampoo(0.1)
    params = {"a": jnp.ones((6, 4)), "b": jnp.ones((4, 6)), "c": jnp.ones((6, 4))}
    tree = state_to_tree(filled(tx.init(params)), params)
    old = tree["parameters"]
    now = {"a": params["c"], "z": params["b"]}  # c renamed to a, b to z, a removed
    new = {**tree, "parameters": {"a": old["c"], "z": old["b"]}}
    state = tree_to_state(new, tx.init(now), now)
    assert_equal(state_to_tree(state, now), new)
    check_state(state, now, tx)


def test_training_goes_on_bit_for_bit_after_orbax(tmp_path):
    def gradients(params, seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)

    tx = shampoo(0.1, b2=0.9)
    update = jax.jit(tx.update)
    params = {"b": jnp.ones((6, 4)), "c": jnp.ones((6, 4)), "d": jnp.ones(3)}
    state = tx.init(params)
    for seed in range(2):
        _, state = update(gradients(params, seed), state, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state_to_tree(state, params))
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "state")

    same = tree_to_state(tree, tx.init(params), params)
    larger = {"a": jnp.ones((4, 6)), **params}
    regrouped = tree_to_state(tree, tx.init(larger), larger)
    for seed in range(2, 4):
        g = gradients(params, seed)
        expected, state = update(g, state, params)
        resumed, same = update(g, same, params)
        assert_equal(resumed, expected)
        # Another program, of larger stacks: XLA may round it otherwise.
        got, regrouped = update({"a": jnp.ones((4, 6)), **g}, regrouped, larger)
        for name in params:
            np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-5)
    assert jnp.isfinite(got["a"]).all()
    assert jnp.abs(got["a"]).max() > 0


def test_a_bare_array_is_a_parameter_too():
    tx, params = scale_by_shampoo(), jnp.ones((3, 2))
    state = filled(tx.init(params))
    assert_equal(tree_to_state(state_to_tree(state, params), tx.init(params), params), state)
    check_state(state, params, tx)


def test_variables_of_nnx_are_parameters():
    params = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    tx = shampoo(0.1)
    state = filled(tx.init(params))
    tree = state_to_tree(state, params)
    assert sorted(tree["parameters"]) == ["bias/value", "kernel/value"]
    assert_equal(tree_to_state(tree, tx.init(params), params), state)
    check_state(state, params, tx)


def test_random_keys_are_kept():
    tx = optax.chain(scale_by_shampoo(), optax.add_noise(0.1, 0.5, jax.random.key(3)))
    state = tx.init(PARAMS)
    back = tree_to_state(state_to_tree(state, PARAMS), tx.init(PARAMS), PARAMS)
    assert jax.random.key_data(back[1].rng_key).tolist() == [0, 3]


def test_placement_is_that_of_the_fresh_state():
    tx = scale_by_shampoo()
    device = jax.devices()[1]
    fresh = jax.device_put(tx.init(PARAMS), device)
    back = tree_to_state(state_to_tree(filled(tx.init(PARAMS)), PARAMS), fresh, PARAMS)
    assert {d for x in jax.tree.leaves(back) for d in x.devices()} == {device}
    # What nobody placed stays free to follow the parameters.
    free = tree_to_state(state_to_tree(fresh, PARAMS), tx.init(PARAMS), PARAMS)
    assert not any(x.committed for x in jax.tree.leaves(free))


def flipped(path, leaf):
    return DimensionNumbers(((0,), (2, 1))) if len(leaf.shape) == 3 else None


FLIPPED = Blocking(dimension_numbers=flipped)


CUBE = {"a": jnp.ones((2, 2)), "cube": jnp.ones((4, 2, 2))}
SQUARES = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2)), "c": jnp.ones((2, 2))}
ROUTED = {"a": jnp.ones((2, 2)), "bias": jnp.ones(2)}

# (optimizer of the state, its parameters, optimizer and parameters of today, message)
CHANGES = {
    "shape": (
        shampoo(0.1),
        SQUARES,
        None,
        SQUARES | {"b": jnp.ones((2, 3))},
        "parameter b, of sha",
    ),
    "renamed": (
        shampoo(0.1),
        SQUARES,
        None,
        {"a": SQUARES["a"], "b": SQUARES["b"], "d": SQUARES["c"]},
        "where parameter d is expected, it holds one that is gone or renamed",
    ),
    "reordered": (
        scale_by_shampoo(),
        [jnp.ones((2, 2)), jnp.ones((3, 2))],
        None,
        [jnp.ones((3, 2)), jnp.ones((2, 2))],
        "parameter 0, of shape (3, 2), had another shape",
    ),
    "layout": (
        scale_by_shampoo(),
        CUBE,
        scale_by_shampoo(blocking=FLIPPED),
        CUBE,
        "parameter cube, of shape (4, 2, 2), was read or cut differently",
    ),
    "added": (
        shampoo(0.1),
        SQUARES,
        shampoo(0.1),
        SQUARES | {"d": jnp.ones((2, 2))},
        "parameter d is missing from it",
    ),
    "removed": (
        shampoo(0.1),
        SQUARES,
        shampoo(0.1),
        {"a": SQUARES["a"], "b": SQUARES["b"]},
        "after the last parameter expected, it holds one that is gone",
    ),
    "routed elsewhere": (
        scale_by_shampoo(),
        ROUTED,
        shampoo(0.1),
        ROUTED,
        "after the last parameter expected, it holds bias",
    ),
    "not ours": (optax.adam(0.1), ROUTED, None, ROUTED, "holds no stacks"),
    "another number": (
        scale_by_shampoo(),
        ROUTED,
        optax.chain(scale_by_shampoo(), scale_by_shampoo()),
        ROUTED,
        "stacks of blocks in 1 place, the optimizer makes them in 2",
    ),
}


@pytest.mark.parametrize(("tx", "params", "now", "today", "message"), CHANGES.values(), ids=CHANGES)
def test_check_names_the_first_change(tx, params, now, today, message):
    with pytest.raises(ValueError) as caught:
        check_state(tx.init(params), today, now)
    assert message in str(caught.value)


def test_check_without_optimizer_accepts_parameters_that_others_take():
    check_state(shampoo(0.1).init(ROUTED), ROUTED | {"scale": jnp.ones(2)})


def refusal(tree, tx, params):
    with pytest.raises(ValueError) as caught:
        tree_to_state(tree, tx.init(params), params)
    return str(caught.value)


def test_trees_that_do_not_fit_are_refused():
    tx = shampoo(0.1)
    tree = state_to_tree(tx.init(SQUARES), SQUARES)
    fewer = {"a": SQUARES["a"]}
    assert "state of b, which is not among the parameters: move" in refusal(tree, tx, fewer)
    reshaped = SQUARES | {"b": jnp.ones((3, 2))}
    assert "parameter b, of shape (3, 2), had another shape" in refusal(tree, tx, reshaped)
    assert "entry of parameter a has no" in refusal(tree, shampoo(0.1, momentum=0.9), SQUARES)
    tree["shared"].popitem()
    assert "the tree has no" in refusal(tree, tx, SQUARES)


def test_a_changed_layout_is_refused():
    tree = state_to_tree(scale_by_shampoo().init(CUBE), CUBE)
    tx = scale_by_shampoo(blocking=FLIPPED)
    assert "parameter cube, of shape (4, 2, 2), was read or cut differently" in refusal(
        tree, tx, CUBE
    )


def test_vectors_of_adamw_are_checked_too():
    tree = state_to_tree(shampoo(0.1).init(ROUTED), ROUTED)
    message = refusal(tree, shampoo(0.1), ROUTED | {"bias": jnp.ones(3)})
    assert "entry of parameter bias has" in message
    assert "shape (2,), which must be (3,)" in message


def test_a_state_of_other_parameters_is_not_regrouped():
    with pytest.raises(ValueError, match="a parameter that is not among these"):
        state_to_tree(shampoo(0.1).init(SQUARES), {"a": SQUARES["a"]})
    with pytest.raises(ValueError, match="or had another shape"):
        state_to_tree(shampoo(0.1).init(SQUARES), SQUARES | {"a": jnp.ones((2, 3))})


@pytest.mark.parametrize("tree", [None, {}, {"parameters": {}}])
def test_what_is_no_tree_of_ours_is_refused(tree):
    with pytest.raises(ValueError, match="keys 'parameters' and 'shared' .* state_to_tree made it"):
        tree_to_state(tree, shampoo(0.1).init(SQUARES), SQUARES)


def test_paths_that_coincide_are_refused():
    with pytest.raises(ValueError, match="same path"):
        check_state(None, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})


def test_another_format_is_refused_with_its_number_and_the_remedy():
    tx = shampoo(0.1)
    tree = state_to_tree(tx.init(SQUARES), SQUARES)
    assert tree["format"] == FORMAT
    older = {key: tree[key] for key in ("parameters", "shared")}  # number 1 had no such key
    message = refusal(older, tx, SQUARES)
    assert "the tree has format number 1, the shampoo_jax that is installed reads 2" in message
    assert (
        "finish the run with the one that saved it, whose shampoo_jax.FORMAT is that number"
        in message
    )
    newer = {**tree, "format": np.int32(FORMAT + 1)}
    assert "format number 3" in refusal(newer, tx, SQUARES)


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_state_of_another_format_is_refused_wherever_it_lies(tx):
    """A state restored as it is, in which the same leaves would be read in another way."""
    newer = jax.tree.map(
        lambda x: x._replace(format=x.format + 1) if is_blocked(x) else x,
        tx.init(PARAMS),
        is_leaf=is_blocked,
    )
    for call in (check_state, state_to_tree):
        with pytest.raises(
            ValueError, match="state has format number 3, .* reads 2: finish the run"
        ):
            call(newer, PARAMS)
    tree = state_to_tree(tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="state has format number 3, .* reads 2: finish the run"):
        tree_to_state(tree, newer, PARAMS)


def test_layout_says_whose_each_block_is():
    params = {"a": jnp.ones((4, 2)), "b": jnp.ones(3), "c": jnp.ones((2, 2))}
    state = shampoo(0.1, blocking=Blocking(2)).init(params)
    assert state_layout(state) == [{"2x2": [0, 0, 1]}]
    assert state_layout(optax.sgd(0.1).init(params)) == []
    two = optax.chain(scale_by_shampoo(), scale_by_soap()).init(params)
    assert state_layout(two) == [{"4x2": [0], "3": [1], "2x2": [2]}] * 2


def test_a_vmapped_state_is_answered_with_what_to_do():
    tx, params = shampoo_jax.scale_by_shampoo(monitor=1), {"w": jnp.ones((2, 3, 2))}
    state = jax.vmap(tx.init)(params)
    one, single = (jax.tree.map(lambda x: x[0], tree) for tree in (state, params))
    tree = state_to_tree(one, single)
    for ask in (
        lambda: check_state(state, params),
        lambda: state_to_tree(state, params),
        lambda: tree_to_state(tree, state, params),
        lambda: state_layout(state),
    ):
        with pytest.raises(ValueError, match="stack of several, as vmap makes them: give one of"):
            ask()
    check_state(one, single)
    shampoo_jax.check_finite(state)
    assert shampoo_jax.read_monitor(state)["3x2"]["graft_ratio"].shape == (2, 1)  # one row each
    with pytest.raises(ValueError, match="where vmap made it, update under vmap as well"):
        tx.update(params, state, params)
