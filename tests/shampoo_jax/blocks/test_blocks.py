"""Cutting parameters into stacks and back, and parts lifted onto the stacks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shampoo_jax.blocks.blocks import Blocks, from_gradients, norms, on_gradients, on_updates
from shampoo_jax.blocks.plan import DimensionNumbers, make_plan
from shampoo_jax.parts.factors import accumulate_factors
from shampoo_jax.parts.filtering import filter_gradient
from shampoo_jax.parts.grafting import graft, scale_by_second_moment
from shampoo_jax.parts.roots import invert_roots, precondition
from shampoo_jax.stacks.blocked import blocked
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
    return shape, draw(DTYPES), DimensionNumbers(tuple(g for g in groups if g), batch)


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


@settings(max_examples=40, deadline=None)
@given(
    specs=st.lists(leaves_with_numbers(), min_size=1, max_size=3),
    block_size=st.sampled_from([None, 1, 2, 3, 4, 64]),
    merge=st.sampled_from([None, 1, 2, 3]),
    canonical=st.booleans(),
)
def test_join_inverts_split_and_stacks_hold_the_boxes(specs, block_size, merge, canonical):
    leaves = [fill(shape, dtype, i) for i, (shape, dtype, _) in enumerate(specs)]
    plan = make_plan(
        leaves,
        block_size=block_size,
        merge=merge,
        canonical=canonical,
        dimension_numbers=lambda path, leaf: specs[path[0].idx][2],
    )
    dtypes = [x.dtype for x in leaves]

    @jax.jit
    def there_and_back(leaves):
        stacks = split(leaves, plan)
        return stacks, join(stacks, plan, dtypes)

    stacks, joined = there_and_back(leaves)
    for x, y in zip(leaves, joined, strict=True):
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(x, np.float32))
    expected = {}
    for x, (_, _, numbers), leaf in zip(leaves, specs, plan, strict=True):
        for cell in leaf.cells:
            block = cut(np.asarray(x, np.float32), numbers, leaf.merged, leaf.batch, cell)
            expected.setdefault(cell.key, []).append(block)
    assert set(stacks) == set(expected)
    for key, stack in stacks.items():
        assert stack.dtype == jnp.float32
        np.testing.assert_array_equal(stack, np.concatenate(expected[key]))
    assert sum(math.prod(s.shape) for s in stacks.values()) == sum(x.size for x in leaves)


def test_float64_blocks_stay_float64():
    with jax.enable_x64(True):
        leaves = [jnp.full((3, 2), 1 / 3, jnp.float64), jnp.full((2, 3), 1 / 3, jnp.float32)]
        plan = make_plan(leaves, block_size=None, merge=None, canonical=True)
        stacks = split(leaves, plan)
        assert {key: s.dtype.name for key, s in stacks.items()} == {"3x2": "float64"}
        back = join(stacks, plan, [x.dtype for x in leaves])
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
    tx = blocked(on_updates(optax.identity()), block_size=3, merge=merge)
    updates, _ = jax.jit(tx.update)(TREE, tx.init(TREE))
    assert jax.tree.structure(updates) == jax.tree.structure(TREE)
    for new, old in zip(jax.tree.leaves(updates), jax.tree.leaves(TREE), strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("tree", [{}, {"empty": np.ones((0, 4), np.float32)}])
def test_blocked_without_any_block(tree):
    tx = blocked(filter_gradient())
    updates, _ = tx.update(tree, tx.init(tree), tree)
    assert jax.tree.map(np.shape, updates) == jax.tree.map(np.shape, tree)


def test_batch_axes_are_blocks_of_their_own():
    rule = {"layers": DimensionNumbers(((1,), (2,)), batch=(0,))}
    tx = blocked(
        accumulate_factors(0.5), dimension_numbers=lambda path, leaf: rule.get(path[0].key)
    )
    params = {"layers": fill((3, 4, 2), jnp.float32, 0), "other": fill((4, 2), jnp.float32, 1)}
    _, state = jax.jit(tx.update)(params, tx.init(params))
    left, right = state.inner.factors["4x2"]
    assert (left.shape, right.shape) == ((4, 4, 4), (4, 2, 2))
    for i, g in enumerate([*np.asarray(params["layers"]), np.asarray(params["other"])]):
        np.testing.assert_allclose(left[i], 0.5 * g @ g.T, rtol=1e-6)
        np.testing.assert_allclose(right[i], 0.5 * g.T @ g, rtol=1e-6)


@pytest.mark.parametrize("option", ["block_size", "merge"])
def test_limits_below_one_are_refused(option):
    with pytest.raises(ValueError, match=f"{option}=0 must be at least 1"):
        blocked(filter_gradient(), **{option: 0})


PLAIN = {"w": fill((4, 3), jnp.float32, 0), "v": (fill((3,), jnp.bfloat16, 1), jnp.float32(2.0))}
PARTS = {
    "filter_gradient": filter_gradient(0.9),
    "accumulate_factors": accumulate_factors(0.9),
    "invert_roots": invert_roots(),
    "precondition": precondition(),
    "scale_by_second_moment": scale_by_second_moment(0.9),
    "graft": graft(scale_by_second_moment(0.9), filter_gradient(0.9)),
    "on_updates": on_updates(optax.scale_by_adam()),
    "on_gradients": on_gradients(optax.clip(1.0)),
    "from_gradients": from_gradients(optax.scale_by_sign()),
}


@pytest.mark.parametrize("name", PARTS)
def test_every_part_runs_alone_on_a_plain_tree(name):
    tx, update = PARTS[name], jax.jit(PARTS[name].update)
    state = tx.init(PLAIN)
    for _ in range(2):
        updates, new = update(PLAIN, state, PLAIN)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        state = new
    assert jax.tree.structure(updates) == jax.tree.structure(PLAIN)
    for new, old in zip(jax.tree.leaves(updates), jax.tree.leaves(PLAIN), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        assert np.isfinite(np.asarray(new, np.float32)).all()


def test_plain_arrays_and_stacks_of_one_block_agree():
    tx = graft(scale_by_second_moment(0.9), filter_gradient(0.8))
    inside = blocked(tx, merge=None, canonical=False)

    @jax.jit
    def step(a, b):
        (x, a), (y, b) = tx.update(PLAIN, a), inside.update(PLAIN, b)
        return a, b, x, y

    a, b = tx.init(PLAIN), inside.init(PLAIN)
    for _ in range(2):
        a, b, x, y = step(a, b)
    for left, right in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(
            np.asarray(left, np.float32), np.asarray(right, np.float32), rtol=1e-6
        )


def numpy_root(factor, exponent):
    w, q = np.linalg.eigh(factor)
    keep = w > len(w) * np.finfo(np.float32).eps * w.max()
    return (q * np.where(keep, np.where(keep, w, 1.0) ** -exponent, 0.0)) @ q.T


def test_stock_transformations_between_the_parts_of_the_walk():
    b1, b2, limit = 0.9, 0.8, 0.5
    tx = blocked(
        optax.chain(
            filter_gradient(b1),
            on_gradients(optax.clip(limit)),
            accumulate_factors(b2),
            invert_roots(),
            on_updates(optax.scale_by_adam(b1=0.7, b2=0.6, eps=1e-3)),
            precondition(),
        ),
        canonical=False,
    )
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros((4, 3))}
    state, update = tx.init(params), jax.jit(tx.update)
    mu = m = v = left = right = 0.0
    for t in range(1, 4):
        g = rng.normal(size=(4, 3))
        updates, state = update({"w": jnp.asarray(g, jnp.float32)}, state)
        mu = b1 * mu + (1 - b1) * g  # the filter saw the gradient before it was clipped
        f = mu / (1 - b1**t)
        c = np.clip(g, -limit, limit)
        left, right = b2 * left + (1 - b2) * c @ c.T, b2 * right + (1 - b2) * c.T @ c
        m, v = 0.7 * m + 0.3 * f, 0.6 * v + 0.4 * f**2
        adam = m / (1 - 0.7**t) / (np.sqrt(v / (1 - 0.6**t)) + 1e-3)
        correction = 1 - b2**t
        expected = (
            numpy_root(left / correction, 1 / 4) @ adam @ numpy_root(right / correction, 1 / 4)
        )
        np.testing.assert_allclose(updates["w"], expected, rtol=2e-4, atol=1e-5)


def test_from_gradients_starts_from_the_raw_gradient():
    tx = optax.chain(on_updates(optax.scale(0.0)), from_gradients(optax.scale(-2.0)))
    blocks = {"2": Blocks(gradient=jnp.ones((1, 2)), update=jnp.ones((1, 2)))}
    new, _ = tx.update(blocks, tx.init(blocks))
    np.testing.assert_array_equal(new["2"].update, [[-2.0, -2.0]])
    np.testing.assert_array_equal(new["2"].gradient, [[1.0, 1.0]])


def test_lifted_transformations_see_parameters():
    tx = blocked(on_updates(optax.add_decayed_weights(0.5)), block_size=2)
    params = {"w": jnp.arange(6.0).reshape(3, 2)}
    updates, _ = tx.update({"w": jnp.ones((3, 2))}, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], 1 + 0.5 * np.arange(6.0).reshape(3, 2))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_norms_neither_overflow_nor_vanish(size):
    x = np.stack([np.full((3, 4), size, np.float32), np.zeros((3, 4), np.float32)])
    np.testing.assert_allclose(norms(jnp.asarray(x)), [size * np.sqrt(12), 0.0], rtol=1e-6)
    assert norms(jnp.full((2,), size)).shape == (2,)  # 0-D blocks


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
    tx = blocked(on_updates(optax.identity()))
    params = {"w": jnp.ones((5, 3)), "v": jnp.ones(2)}
    grads = {name: shape and jnp.ones(shape) for name, shape in grads.items()}
    with pytest.raises(ValueError, match=complaint):
        tx.update(grads, tx.init(params), params)


def test_plain_numbers_are_parameters_as_in_optax():
    for tx in (blocked(on_updates(optax.identity())), optax.identity()):
        params = {"scale": 2.0, "w": np.ones((2, 2), np.float32)}
        updates, _ = tx.update(params, tx.init(params), params)
        assert updates["scale"] == 2.0 and jnp.shape(updates["scale"]) == ()
