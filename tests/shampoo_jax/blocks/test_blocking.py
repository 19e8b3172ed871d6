"""How parameters are cut, as one object: values that are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import shampoo_jax as sj


def test_objects_are_values():
    assert sj.Blocking() == sj.Blocking(1024, 2, True, "flax")
    assert hash(sj.Blocking(np.int64(4))) == hash(sj.Blocking(4))
    assert dataclasses.replace(sj.Blocking(4), merge=None) == sj.Blocking(4, None)


def test_none_means_the_defaults():
    params = {"w": jnp.ones((2000, 3))}
    states = [
        jax.eval_shape(sj.scale_by_shampoo(blocking=b).init, params) for b in (None, sj.Blocking())
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert set(states[0].inner_state.leaves) == {"1024x3", "976x3"}
