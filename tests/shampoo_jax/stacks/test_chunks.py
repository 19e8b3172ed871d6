"""Stacks in chunks: the same values, shared state once, as many blocks at a time as asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj
from shampoo_jax.stacks.chunks import BYTES, chunk_of

PARAMS = {f"w{i}": jnp.zeros((3, 2)) for i in range(7)} | {"v": jnp.zeros((4, 3))}


def run(tx, steps=3):
    state = tx.init(PARAMS)
    for step in range(steps):
        keys = jax.random.split(jax.random.key(step), len(PARAMS))
        gradients = {
            name: jax.random.normal(key, PARAMS[name].shape)
            for name, key in zip(PARAMS, keys, strict=True)
        }
        updates, state = tx.update(gradients, state, PARAMS)
    return updates, state


@pytest.mark.parametrize("chunk", [1, 3, 4])  # of 7 blocks: 7, three of 3 with an overlap, 2 of 4
def test_values_and_state_are_those_of_whole_stacks(chunk):
    def direction(chunk):
        refresh = sj.Refresh(chunk=chunk, stagger=True)
        return sj.scale_by_shampoo(every=2, refresh=refresh, monitor=1)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
        run(direction(chunk)),
        run(direction(100)),
    )


def test_parts_see_chunks_of_blocks_state_and_parameters():
    seen = []

    def update(stacks, state, params, **extra):
        seen.append({key: (b.update.shape, params[key].update.shape) for key, b in stacks.items()})
        new = {key: state["n"][key] + b.index for key, b in stacks.items()}
        return stacks, {"n": new, "count": state["count"] + 1}

    def init(params):
        return {"n": {k: jnp.zeros(len(b.update), int) for k, b in params.items()}, "count": 0}

    tx = sj.blocked(optax.GradientTransformation(init, update), chunk=3)
    state = run(tx, steps=1)[1].inner_state.inner
    assert {"3x2": ((3, 3, 2), (3, 3, 2))} in seen and {"4x3": ((1, 4, 3), (1, 4, 3))} in seen
    assert {len(found) for found in seen} == {1}
    assert int(state["count"]) == 1
    assert sorted(np.concatenate([*state["n"].values()]).tolist()) == list(range(8))


def test_a_skipped_step_changes_nothing_of_a_chunked_stack():
    tx = sj.scale_by_soap(refresh=sj.BasisRefresh(chunk=2))
    _, state = run(tx, steps=1)
    bad = PARAMS | {"w3": jnp.full((3, 2), jnp.nan)}
    updates, after = tx.update(bad, state, PARAMS)
    assert int(after.total_notfinite) == 1 and not any(x.any() for x in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)


def test_an_update_in_chunks_is_differentiable():
    tx = sj.scale_by_one_sided_shampoo(refresh=sj.Refresh(chunk=3))
    state = tx.init(PARAMS)

    def loss(scale):
        gradients = jax.tree.map(
            lambda p: scale * jnp.cos(jnp.arange(p.size)).reshape(p.shape), PARAMS
        )
        return sum((x**2).sum() for x in jax.tree.leaves(tx.update(gradients, state, PARAMS)[0]))

    # The direction does not depend on the scale of the gradients.
    assert abs(float(jax.grad(loss)(2.0))) < 1e-3 * float(loss(2.0))


@pytest.mark.parametrize("d", [16, 100, 512, 768, 1024, 2048, 5000])
@pytest.mark.parametrize("n", [1, 7, 48])
def test_chunks_by_size_are_bounded_in_bytes(n, d):
    chunk, size = chunk_of("auto", n, (d, d), (0.25, 0.25)), 3 * 4 * d * d
    assert 1 <= chunk <= n
    assert chunk == 1 or chunk * size <= BYTES
    assert chunk == n or chunk * size > BYTES / 2


def test_chunks_are_as_equal_as_they_can_be():
    sizes = [chunk_of(c, 12, (2, 2), (0.5, 0.5)) for c in (1, 5, 7, 11, 12, 100, None)]
    assert sizes == [1, 4, 6, 6, 12, 12, 12]
    assert chunk_of("auto", 0, (0, 2), (0.5, 0.5)) == 0


def test_a_stock_magnitude_sees_whole_stacks():
    stock = optax.stateless(lambda u, p: jax.tree.map(lambda x: x / jnp.abs(x).max(), u))
    refresh = sj.Refresh(chunk=2)
    tx = sj.scale_by_shampoo(graft=stock, refresh=refresh)
    whole = sj.scale_by_shampoo(graft=stock)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4), run(tx)[0], run(whole)[0]
    )


@pytest.mark.parametrize("chunk", [0, 1.5, "all"])
def test_a_chunk_that_is_no_number_of_blocks_is_refused(chunk):
    with pytest.raises(ValueError, match="chunk=.* must be"):
        sj.blocked(optax.identity(), chunk=chunk)
