"""Cutting parameters into stacks and back, and parts that run on the stacks."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import shampoo_jax as sj
from shampoo_jax.blocks.exponents import default_exponents
from shampoo_jax.blocks.plan import make_plan
from shampoo_jax.stacks.layout import Layout, OneDevice
from shampoo_jax.stacks.split import join, split

DTYPES = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def leaves_with_numbers(draw):
    """(shape, dtype, dimension numbers or None) of one parameter."""
    shape = draw(SHAPES)
    if not draw(st.booleans()):
        return shape, draw(DTYPES), None
    axes = draw(st.permutations(range(len(shape))))
    cuts = sorted(draw(st.lists(st.integers(0, len(shape)), min_size=2, max_size=2)))
    batch, *groups = (tuple(axes[i:j]) for i, j in zip([0, *cuts], [*cuts, None], strict=True))
    return shape, draw(DTYPES), sj.DimensionNumbers(tuple(g for g in groups if g), batch)


def fill(shape, dtype, seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(-100, 100, shape), dtype)


def cut(x, numbers, merged, batch, cell):
    """The blocks of one cell by numpy alone, `[batch, *block]`."""
    if numbers is not None:
        x = x.transpose(*numbers.batch, *(a for group in numbers.dimensions for a in group))
    x = x.reshape(batch, *merged)
    box = (slice(s, s + n) for s, n in zip(cell.start, cell.size, strict=True))
    x = x[(slice(None), *box)]
    return x.swapaxes(1, 2) if cell.transposed else x


def one_device(leaves, blocking):
    plan = make_plan(leaves, blocking, default_exponents)
    return plan, Layout(OneDevice(), leaves, plan)


@settings(max_examples=40, deadline=None)
@given(
    specs=st.lists(leaves_with_numbers(), min_size=1, max_size=3),
    size=st.sampled_from([None, 1, 2, 3, 4, 64]),
    merge=st.sampled_from([None, 1, 2, 3]),
    canonical=st.booleans(),
)
def test_join_inverts_split_and_stacks_hold_the_boxes(specs, size, merge, canonical):
    leaves = [fill(shape, dtype, i) for i, (shape, dtype, _) in enumerate(specs)]
    rule = lambda path, leaf: specs[path[0].idx][2]  # noqa: E731
    plan, layout = one_device(leaves, sj.Blocking(size, merge, canonical, rule))
    dtypes = [x.dtype for x in leaves]

    @jax.jit
    def there_and_back(leaves):
        stacks = split(leaves, layout)
        return stacks, join(stacks, layout, dtypes)

    stacks, joined = there_and_back(leaves)
    for x, y in zip(leaves, joined, strict=True):
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(x, np.float32))
    expected = {}
    for i in itertools.chain(*plan.groups):
        x, numbers, leaf = np.asarray(leaves[i], np.float32), specs[i][2], plan.leaves[i]
        for cell in leaf.cells:
            block = cut(x, numbers, leaf.merged, leaf.batch, cell)
            expected.setdefault(cell.key, []).append(block)
    assert set(stacks) == set(expected)
    for key, stack in stacks.items():
        # What holds all leaves of the stack; `Blocks.of` widens it.
        wide = {specs[i][1] for i in plan.owners[key]}
        assert stack.dtype == jnp.result_type(*wide)
        stack = np.asarray(stack, np.float32)
        np.testing.assert_array_equal(stack, np.concatenate(expected[key]))
    assert sum(math.prod(s.shape) for s in stacks.values()) == sum(x.size for x in leaves)


def test_float64_blocks_stay_float64():
    with jax.enable_x64(True):
        leaves = [jnp.full((3, 2), 1 / 3, jnp.float64), jnp.full((2, 3), 1 / 3, jnp.float32)]
        _, layout = one_device(leaves, sj.Blocking(None, None))
        stacks = split(leaves, layout)
        assert {key: s.dtype.name for key, s in stacks.items()} == {"3x2": "float64"}
        back = join(stacks, layout, [x.dtype for x in leaves])
    assert [x.dtype.name for x in back] == ["float64", "float32"]
    assert float(back[0][0, 0]) == 1 / 3


TREE = {
    "matrix": np.arange(40.0, dtype=np.float32).reshape(5, 8),
    "list": [np.arange(3.0, dtype=np.float32), np.float32(2.0)],
    "half": jnp.arange(12.0, dtype=jnp.bfloat16).reshape(2, 3, 2),
    "empty": np.ones((0, 4), np.float32),
    "unit": np.ones((1, 1), np.float32),
}


@pytest.mark.parametrize("merge", [None, 1, 2])
def test_blocked_identity_is_the_identity(merge):
    tx = sj.blocked(sj.on_updates(optax.identity()), blocking=sj.Blocking(3, merge))
    updates, _ = jax.jit(tx.update)(TREE, tx.init(TREE))
    assert jax.tree.structure(updates) == jax.tree.structure(TREE)
    for new, old in zip(jax.tree.leaves(updates), jax.tree.leaves(TREE), strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("tree", [{}, {"empty": np.ones((0, 4), np.float32)}])
def test_blocked_without_any_block(tree):
    tx = sj.blocked(sj.filter_gradient())
    updates, _ = tx.update(tree, tx.init(tree), tree)
    assert jax.tree.map(np.shape, updates) == jax.tree.map(np.shape, tree)


def test_batch_axes_are_blocks_of_their_own():
    rule = {"layers": sj.DimensionNumbers(((1,), (2,)), batch=(0,))}
    blocking = sj.Blocking(dimension_numbers=lambda path, leaf: rule.get(path[0].key))
    tx = sj.blocked(sj.accumulate_factors(0.5), blocking=blocking)
    params = {"layers": fill((3, 4, 2), jnp.float32, 0), "other": fill((4, 2), jnp.float32, 1)}
    _, state = jax.jit(tx.update)(params, tx.init(params))
    left, right = state.inner_state.inner.factors["4x2"]
    assert (left.shape, right.shape) == ((4, 4, 4), (4, 2, 2))
    for i, g in enumerate([*np.asarray(params["layers"]), np.asarray(params["other"])]):
        np.testing.assert_allclose(left[i], 0.5 * g @ g.T, rtol=1e-6)
        np.testing.assert_allclose(right[i], 0.5 * g.T @ g, rtol=1e-6)


def test_lifted_transformations_see_parameters():
    decay = sj.on_updates(optax.add_decayed_weights(0.5))
    tx = sj.blocked(decay, blocking=sj.Blocking(2))
    params = {"w": jnp.arange(6.0).reshape(3, 2)}
    updates, _ = tx.update({"w": jnp.ones((3, 2))}, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], 1 + 0.5 * np.arange(6.0).reshape(3, 2))


@pytest.mark.parametrize(
    ("grads", "complaint"),
    [
        ({"w": (3, 5), "v": 2}, r"'w' has shape \(5, 3\), its gradient \(3, 5\)"),
        ({"w": None, "u": 2}, r"'v' has shape \(2,\), its gradient None .*one tree"),
        ({"w": (5, 3), "v": 2, "u": 2}, r"'u' has shape None, its gradient \(2,\)"),
    ],
)
def test_gradients_of_another_tree_are_refused_by_name(grads, complaint):
    """A transposed gradient would fill the same stack of blocks."""
    tx = sj.blocked(sj.on_updates(optax.identity()))
    params = {"w": jnp.ones((5, 3)), "v": jnp.ones(2)}
    grads = {name: shape and jnp.ones(shape) for name, shape in grads.items()}
    with pytest.raises(ValueError, match=complaint):
        tx.update(grads, tx.init(params), params)


def test_plain_numbers_are_parameters_as_in_optax():
    for tx in (sj.blocked(sj.on_updates(optax.identity())), optax.identity()):
        params = {"scale": 2.0, "w": np.ones((2, 2), np.float32)}
        updates, _ = tx.update(params, tx.init(params), params)
        assert updates["scale"] == 2.0 and jnp.shape(updates["scale"]) == ()


def sum_of_further(stacks, state, params=None, **extra):
    """Updates that show what came along: both trees, the microbatches summed."""
    return {
        key: dataclasses.replace(b, update=b.further["half"] + b.further["micro"].sum(1))
        for key, b in stacks.items()
    }, state


FURTHER = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), sum_of_further)


def with_further(grads):
    micro = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), grads)
    return {"half": jax.tree.map(lambda x: x / 2, grads), "micro": micro}


@pytest.mark.parametrize("axis_type", [None, AxisType.Auto, AxisType.Explicit])
def test_further_trees_are_cut_like_gradients(axis_type):
    grads = {"w": jnp.arange(16.0 * 12).reshape(16, 12), "v": jnp.arange(6.0)}
    further, place = with_further(grads), None
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type or AxisType.Auto,))
    if axis_type is not None:
        spec = {"w": P("x"), "v": P()}
        place = sj.Placement(mesh, owners="x", parameter_spec=lambda path, _: spec[path[-1].key])
        grads = {k: jax.device_put(x, NamedSharding(mesh, spec[k])) for k, x in grads.items()}
        further["micro"] = {
            k: jax.device_put(x, NamedSharding(mesh, P(None, *spec[k])))
            for k, x in further["micro"].items()
        }
        further["half"] = jax.tree.map(lambda x: x / 2, grads)
    tx = sj.blocked(FURTHER, blocking=sj.Blocking(size=5), placement=place)
    with jax.set_mesh(mesh):
        updates, _ = jax.jit(tx.update)(grads, tx.init(grads), grads, further=further)
    jax.tree.map(lambda u, g: np.testing.assert_array_equal(u, 6.5 * g), updates, grads)


def test_further_trees_pass_complete_optimizers_and_missing_gradients():
    grads = {"w": jnp.arange(6.0).reshape(3, 2), "u": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    tx = sj.as_optimizer(sj.blocked(FURTHER), 0.5)
    further = with_further(grads)
    for tree in further.values():
        tree["u"] = None
    updates, _ = tx.update({**grads, "u": None}, tx.init(grads), grads, further=further)
    np.testing.assert_array_equal(updates["w"], -0.5 * 6.5 * grads["w"])
    assert updates["u"] is None


def test_a_further_tree_that_is_not_finite_skips_the_step():
    grads = {"w": jnp.ones((3, 2))}
    tx, further = sj.blocked(FURTHER), with_further(grads)
    further["half"]["w"] = further["half"]["w"].at[0, 0].set(jnp.nan)
    updates, state = tx.update(grads, tx.init(grads), further=further)
    np.testing.assert_array_equal(updates["w"], 0.0)
    assert int(state.total_notfinite) == 1


@pytest.mark.parametrize(
    "leaf", [jnp.ones((2, 3)), None, jnp.ones((2, 2, 3, 2)), jnp.ones((4, 3, 2))]
)
def test_a_further_tree_of_other_leaves_is_refused(leaf):
    grads = {"w": jnp.ones((3, 2)), "v": jnp.ones(2)}
    tx = sj.blocked(FURTHER)
    with pytest.raises(ValueError, match=r"further\['half'\].*'[wv]'.*like that of the gradients"):
        further = {"half": {"w": leaf, "v": jnp.ones(2)}}
        tx.update(grads, tx.init(grads), further=further)


def test_further_trees_come_along_in_chunks():
    grads = {"w": jnp.arange(40.0).reshape(10, 4)}
    tx = sj.blocked(FURTHER, blocking=sj.Blocking(size=2), chunk=3)
    updates, _ = tx.update(grads, tx.init(grads), grads, further=with_further(grads))
    np.testing.assert_array_equal(updates["w"], 6.5 * grads["w"])
