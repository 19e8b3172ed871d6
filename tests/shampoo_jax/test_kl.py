"""The KL family where finite gradients overflow, and KL statistics around a chain of parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj

KL = {
    "kl_soap": lambda: sj.kl_soap(0.1, **sj.presets.record_19()),
    "kl_shampoo": lambda: sj.kl_shampoo(0.1, every=2, b2=0.9),
}


def failures(state):
    """Failures of every part that counts them, summed."""
    nodes = jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "failures"))
    counted = [x for s in nodes if hasattr(s, "failures") for x in jax.tree.leaves(s.failures)]
    assert counted
    return sum(int(x.sum()) for x in counted)


def assert_finite(tree):
    for x in jax.tree.leaves(tree):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("name", KL)
def test_whitened_squares_that_overflow_are_skipped_and_counted(name):
    """One entry of 4e18: its square is a float32, 4000^2 times its square is not."""
    rng = np.random.default_rng(0)
    tx = KL[name]()
    params = {"w": jnp.ones((4, 4))}
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(1, 121):
        g = 1e-3 * rng.normal(size=(4, 4))
        if step == 110:
            g[1, 2] = 4e18
            assert failures(state) == 0
        updates, state = update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        assert_finite((updates, state))
        params = optax.apply_updates(params, updates)
    assert failures(state) == 1
    assert np.abs(updates["w"]).max() > 0


def test_only_the_block_that_overflows_is_skipped():
    rng = np.random.default_rng(0)
    grads = [1e-3 * rng.normal(size=(4, 8)).astype(np.float32) for _ in range(6)]
    huge = [*grads[:3], grads[3].copy(), *grads[4:]]
    huge[3][0, 0] = 1e19
    tx = sj.scale_by_kl_shampoo(0.9, 0.9, every=2, block_size=4)
    params = {"w": jnp.ones((4, 8))}

    def run(grads):
        state, update, updates = tx.init(params), jax.jit(tx.update), []
        for g in grads:
            u, state = update({"w": jnp.asarray(g)}, state)
            updates.append(np.asarray(u["w"]))
        return updates, state

    (plain, _), (skipped, state) = run(grads), run(huge)
    for a, b in zip(plain, skipped, strict=True):
        np.testing.assert_array_equal(a[:, 4:], b[:, 4:])
    np.testing.assert_array_equal(skipped[3][:, :4], 0.0)
    assert failures(state) == 1
    assert_finite(state)


def test_soap_counts_refused_bases():
    tx = sj.scale_by_soap(0.9, 0.95, every=1)
    params = {"w": jnp.ones((3, 2))}
    state, update, counts = tx.init(params), jax.jit(tx.update), []
    for size in (1.0, 1.0, 1e30, 1.0):
        _, state = update({"w": size * jnp.eye(3, 2)}, state)
        counts.append(failures(state))
    assert counts == [0, 0, 1, 2]


def test_kl_statistics_need_roots():
    tx = sj.blocked(sj.accumulate_kl_factors(sj.damp(0.1)))
    with pytest.raises(ValueError, match="keeps 0 sets of roots"):
        tx.init({"w": jnp.ones((3, 2))})


def test_decay_in_the_basis_is_decay_of_the_parameters():
    rng = np.random.default_rng(0)
    params, *grads = (jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for _ in range(5))

    def run(inner):
        tx = sj.blocked(sj.kl_eigenbasis(sj.on_updates(inner), 0.9, scaled=False, every=2))
        state, update, updates = tx.init(params), jax.jit(tx.update), []
        for g in grads:
            u, state = update(g, state, params)
            updates.append(u)
        return updates

    bare, decayed = (
        run(optax.trace(0.9)),
        run(optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1))),
    )
    for a, b in zip(bare[1:], decayed[1:], strict=True):  # the first step is skipped
        np.testing.assert_allclose(b - a, 0.1 * params, atol=1e-5)
