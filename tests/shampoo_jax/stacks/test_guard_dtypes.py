"""Narrow trees are computed in float32 and keep their dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shampoo_jax.stacks.guard import in_float32


def test_bfloat16_is_rounded_once_and_states_are_float32():
    tx = in_float32(optax.chain(optax.add_decayed_weights(0.3), optax.trace(0.9)))
    rng = np.random.default_rng(0)
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
