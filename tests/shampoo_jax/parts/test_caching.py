"""Scales that are kept between their computations."""

import jax.numpy as jnp
import numpy as np
import pytest

import shampoo_jax as sj


def test_a_scale_is_computed_at_the_first_step_and_every_third_after_it():
    tx = sj.cached_scale(sj.scale_by_second_moment(0.0), every=3)
    gradients, state, found = [1.0, 2.0, 4.0, 8.0, 16.0], tx.init(jnp.zeros(1)), []
    for g in gradients:
        update, state = tx.update(jnp.array([g]), state)
        found.append(float(update[0]))
    np.testing.assert_allclose(found, [1, 2, 4, 1, 2], rtol=1e-6)
    assert int(state.inner.count) == 2  # what is not looked at is not counted either


def test_every_is_checked():
    with pytest.raises(ValueError, match="every=0"):
        sj.cached_scale(sj.scale_by_second_moment(), every=0)
