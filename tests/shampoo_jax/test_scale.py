"""A loss on another scale, a sum for a mean say, trains alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shampoo_jax as sj

rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


# Two matrices share a stack, a third has its own, and two parameters go to AdamW.
SHAPES = {"a": (3, 3), "b": (3, 3), "c": (2, 2), "embed": (2, 2), "v": (2,)}
PARAMS = {name: normal(*shape) for name, shape in SHAPES.items()}


def assert_close(a, b, rtol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * float(jnp.abs(y).max()))


def shampoo(**options):
    return sj.shampoo(0.1, b2=0.8, weight_decay=0.1, momentum=0.5, **options)


@functools.partial(jax.jit, static_argnums=0)
def train(make, params, gradients, factor):
    """Updates of all steps; gradients have one entry a step."""
    tx = make()

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(jax.tree.map(lambda x: x * factor, g), state, params)
        return (optax.apply_updates(params, updates), state), updates

    return jax.lax.scan(step, (params, tx.init(params)), gradients)[1]


def drawn(seed, size, spread=1.0, shift=0.0):
    """Four steps of gradients; with a shift matrices have singular values near 1 to 10 shifts."""
    draw = np.random.default_rng(seed)

    def one(p):
        center = np.diag(np.geomspace(1, 10, len(p))) if p.ndim == 2 else 1.0
        gradient = spread * draw.normal(size=(4, *p.shape)) + shift * center
        return jnp.asarray(size * gradient, jnp.float32)

    return jax.tree.map(one, PARAMS)


def assert_scale_does_not_matter(gradients, factor, rtol):
    scaled, plain = (train(shampoo, PARAMS, gradients, x) for x in (factor, 1.0))
    assert_close(scaled, plain, rtol)


SEEDS, SIZES = st.integers(0, 2**32 - 1), st.floats(1e-2, 1e2)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=SEEDS, exponent=st.integers(-20, 20), size=SIZES)
def test_a_scale_that_rounds_nothing_changes_nothing(seed, exponent, size):
    """Neither direction nor decay nor the parameters of AdamW."""
    assert_scale_does_not_matter(drawn(seed, size), 2.0**exponent, 1e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=SEEDS, factor=st.sampled_from([1e-6, 1e6]) | st.floats(1e-6, 1e6), size=SIZES)
def test_any_scale_changes_nothing_beyond_rounding(seed, factor, size):
    """Rounding counts as often as the factors' condition number, which is about 100 here."""
    assert_scale_does_not_matter(drawn(seed, size, spread=0.1, shift=1.0), factor, 2e-4)


def test_the_scale_property_can_fail():
    def absolute():
        graft = sj.scale_by_second_moment(0.9, 1e-2)
        return shampoo(graft=graft, others=optax.adamw(0.1, eps=1e-2))

    million, one = (train(absolute, PARAMS, drawn(0, 1.0), x) for x in (1e6, 1.0))
    with pytest.raises(AssertionError):
        assert_close(million, one, 1e-3)


def test_sum_and_mean_reduced_losses_train_alike():
    inputs, target = normal(64, 3), normal(64, 2)
    params = {"dense": {"kernel": normal(3, 2), "bias": normal(2)}}

    def trained(reduce):
        tx = sj.shampoo(optax.linear_schedule(0.1, 0.0, 30), weight_decay=0.01)

        def loss(p):
            error = inputs @ p["dense"]["kernel"] + p["dense"]["bias"] - target
            return reduce(error**2)

        @jax.jit
        def train(params):
            def step(carry, _):
                params, state = carry
                updates, state = tx.update(jax.grad(loss)(params), state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, tx.init(params)), None, 30)[0][0]

        return train(params)

    assert_close(trained(jnp.sum), trained(jnp.mean), 1e-3)
