"""Leaves without a gradient, whatever they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shampoo_jax as sj

STRANGERS = {
    "int": 3,
    "bool": True,
    "float": 0.5,
    "numpy float": np.float32(0.5),
    "numpy int": np.int64(2),
    "flags": jnp.array([True, False]),
    "integers": jnp.arange(6).reshape(2, 3),
    "numpy integers": np.arange(3),
    "key": jax.random.key(0),
    "old key": jax.random.PRNGKey(0),
    "text": "relu",
}
IN_STATE = ("int", "float", "numpy float", "numpy int", "integers", "numpy integers", "old key")


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("tx", [sj.shampoo(0.1), sj.scale_by_soap()], ids=["routed", "all"])
def test_what_has_no_gradient_may_be_anything(tx, name):
    """Leaves of a module of whose arrays alone the state was made, as `eqx.filter` gives them."""
    w, grad = jnp.ones((3, 2)), jnp.eye(3, 2)
    wanted, _ = tx.update({"w": grad}, tx.init({"w": w}), {"w": w})
    other = STRANGERS[name]
    states = [tx.init({"w": w, "n": None})]
    if name in IN_STATE:
        states.append(tx.init({"w": w, "n": other}))
    for state in states:
        got, _ = tx.update({"w": grad, "n": None}, state, {"w": w, "n": other})
        np.testing.assert_array_equal(got["w"], wanted["w"])
        assert got["n"] is None


def test_a_plain_number_of_the_state_is_trained_when_it_has_a_gradient():
    tx, params = sj.shampoo(0.1), {"w": jnp.ones((3, 2)), "scale": 0.5}
    state = tx.init(params)
    got, state = tx.update({"w": jnp.eye(3, 2), "scale": None}, state, params)
    got, state = tx.update({"w": jnp.eye(3, 2), "scale": jnp.ones([])}, state, params)
    assert got["scale"] < 0
