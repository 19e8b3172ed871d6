"""A rule of parameters scales their updates, whatever optimizer makes them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj

PARAMS = {"layer": {"w": jnp.ones((4, 2)), "none": None}, "b": jnp.ones(3, jnp.bfloat16)}


def by_name(path, leaf):
    return 0.5 if path[-1].key == "w" else jnp.asarray(leaf.size)


@pytest.mark.parametrize("jit", [False, True])
def test_each_update_is_multiplied_by_the_rule(jit):
    tx = optax.chain(optax.scale(-1.0), sj.scale_per_parameter(by_name))
    update = jax.jit(tx.update) if jit else tx.update
    updates, _ = update(PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["layer"]["w"], -0.5)
    np.testing.assert_array_equal(updates["b"].astype(float), -3.0)
    assert updates["b"].dtype == jnp.bfloat16 and updates["layer"]["none"] is None


@pytest.mark.parametrize("given", [jnp.ones(3), None, "2", float("nan"), [1.0]])
def test_a_rule_that_gives_no_number_is_refused(given):
    tx = sj.scale_per_parameter(lambda path, leaf: given)
    with pytest.raises(ValueError, match="'b'.*a finite number is needed"):
        tx.update({"b": jnp.ones(3)}, tx.init(PARAMS))
