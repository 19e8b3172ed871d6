"""Cutting parameters into stacks and back, and parts that run on the stacks."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
