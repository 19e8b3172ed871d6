"""Stacks of blocks, and parts on plain trees and between stock transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj
from shampoo_jax.blocks.blocks import Blocks, along, norms, where_block


def fill(shape, dtype, seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(-100, 100, shape), dtype)


PLAIN = {"w": fill((4, 3), jnp.float32, 0), "v": (fill((3,), jnp.bfloat16, 1), jnp.float32(2.0))}
PARTS = {
    "filter_gradient": sj.filter_gradient(0.9),
    "accumulate_factors": sj.accumulate_factors(0.9),
    "invert_roots": sj.invert_roots(),
    "precondition": sj.precondition(),
    "scale_by_second_moment": sj.scale_by_second_moment(0.9),
    "graft": sj.graft(sj.scale_by_second_moment(0.9), sj.filter_gradient(0.9)),
    "on_updates": sj.on_updates(optax.scale_by_adam()),
    "on_gradients": sj.on_gradients(optax.clip(1.0)),
    "from_gradients": sj.from_gradients(optax.scale_by_sign()),
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
    tx = sj.graft(sj.scale_by_second_moment(0.9), sj.filter_gradient(0.8))
    inside = sj.blocked(tx, blocking=sj.Blocking(merge=None, canonical=False))

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
    tx = sj.blocked(
        optax.chain(
            sj.filter_gradient(b1),
            sj.on_gradients(optax.clip(limit)),
            sj.accumulate_factors(b2),
            sj.invert_roots(),
            sj.on_updates(optax.scale_by_adam(b1=0.7, b2=0.6, eps=1e-3)),
            sj.precondition(),
        ),
        blocking=sj.Blocking(canonical=False),
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
    tx = optax.chain(sj.on_updates(optax.scale(0.0)), sj.from_gradients(optax.scale(-2.0)))
    blocks = {"2": Blocks.of(jnp.ones((1, 2)))}
    new, _ = tx.update(blocks, tx.init(blocks))
    np.testing.assert_array_equal(new["2"].update, [[-2.0, -2.0]])
    np.testing.assert_array_equal(new["2"].gradient, [[1.0, 1.0]])


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_norms_neither_overflow_nor_vanish(size):
    x = np.stack([np.full((3, 4), size, np.float32), np.zeros((3, 4), np.float32)])
    np.testing.assert_allclose(norms(jnp.asarray(x)), [size * np.sqrt(12), 0.0], rtol=1e-6)
    assert norms(jnp.full((2,), size)).shape == (2,)  # 0-D blocks


def test_blocks_of_an_array():
    """Wide, its own update, and Shampoo's exponents where none are given."""
    x = jnp.ones((3, 4, 2), jnp.bfloat16)
    b = Blocks.of(x)
    assert b.gradient.dtype == b.update.dtype == jnp.float32
    assert (b.shape, b.ndim, b.exponents, b.index.tolist()) == ((4, 2), 2, (0.25, 0.25), [0, 1, 2])
    assert b.per_dimension == (None, None)
    with jax.enable_x64(True):
        assert Blocks.of(jnp.ones((1, 2), jnp.float64)).gradient.dtype == jnp.float64
    one_sided = Blocks.of(x, [0.0, 0.5], jnp.array([7, 8, 9]))
    assert (one_sided.exponents, one_sided.index.tolist()) == ((0.0, 0.5), [7, 8, 9])
    assert one_sided.per_factor(lambda n, d, e: (n, d, e)) == (None, (3, 2, 0.5))


def test_exponents_are_static():
    b = Blocks.of(jnp.ones((1, 2)), [0.5])
    assert len(jax.tree.leaves(b)) == 4  # gradient, update, ready, index
    assert jax.tree.structure(b) != jax.tree.structure(Blocks.of(jnp.ones((1, 2)), [0.25]))


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_exponents_of_the_blocks_reach_the_roots(exponent):
    """They are given once, to `blocked`; no part has an option for them."""
    parts = optax.chain(sj.accumulate_factors(0.0), sj.invert_roots(), sj.precondition())
    tx = sj.blocked(parts, exponents={2: {0: exponent, 1: 0}})
    g = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    updates, state = jax.jit(tx.update)({"w": g}, tx.init({"w": g}))
    np.testing.assert_allclose(updates["w"], numpy_root(g @ g.T, exponent) @ g, atol=1e-4)
    left, right = state.inner_state.inner[0].factors["3x3"]
    assert left.shape == (1, 3, 3) and right is None


def test_one_block_of_many_is_chosen():
    new, old = jnp.full((3, 2), 1.0, jnp.bfloat16), jnp.zeros((3, 2))
    chosen = where_block(jnp.array([True, False, True]), new, old)
    assert chosen.dtype == jnp.float32
    assert chosen.tolist() == [[1, 1], [0, 0], [1, 1]]


def test_vectors_along_a_dimension():
    assert along(jnp.ones((5, 3)), 1, 4).shape == (5, 1, 3, 1)
    assert along(jnp.ones((5, 3)), 0, 2).shape == (5, 3)
