"""The loss, its derivative and its sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt.model.loss import pairwise_sum, token_losses


def reference(raw, targets):
    """Loss and its derivative by raw logits in float64, from the definition."""
    raw = np.asarray(raw, np.float64)
    capped = 15 * raw / np.sqrt(raw**2 + 225)
    log_softmax = capped - np.log(np.exp(capped).sum(-1, keepdims=True))
    rows = np.arange(len(raw))
    one_hot = np.zeros_like(raw)
    one_hot[rows, targets] = 1
    slope = 15 * 225 / (raw**2 + 225) ** 1.5
    return -log_softmax[rows, targets], (np.exp(log_softmax) - one_hot) * slope


def case(dtype):
    rng = np.random.default_rng(0)
    raw = jnp.asarray(rng.normal(size=(7, 11)) * [[0.1], [1], [3], [10], [100], [1e4], [0]], dtype)
    targets = rng.integers(0, 11, 7)
    weights = rng.normal(size=7)
    value, pullback = jax.vjp(jax.jit(lambda raw: token_losses(raw, jnp.asarray(targets))), raw)
    (gradient,) = pullback(jnp.asarray(weights, jnp.float32))
    expected, slope = reference(np.asarray(raw, np.float64), targets)
    return value, gradient, expected, slope * weights[:, None]


def test_value_and_derivative_in_float32():
    value, gradient, expected, expected_gradient = case("float32")
    np.testing.assert_allclose(value, expected, atol=3e-6, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6, rtol=0)


def test_bfloat16_logits_give_float32_losses_and_bfloat16_derivatives():
    value, gradient, expected, expected_gradient = case("bfloat16")
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, expected, atol=3e-6, rtol=1e-6)
    np.testing.assert_allclose(np.float64(gradient), expected_gradient, rtol=2**-8, atol=1e-6)


@pytest.mark.trap("A17")
def test_a17_sum_of_a_microbatch_keeps_seven_digits():
    """65536 losses near ln 50304: adding one after the other is off in the fifth digit."""
    losses = np.random.default_rng(0).normal(10.8, 1.0, 65_536 + 17).astype(np.float32)
    exact = losses.astype(np.float64).sum()
    assert abs(float(jax.jit(pairwise_sum)(losses)) / exact - 1) < 2e-7
    one_by_one = np.cumsum(losses, dtype=np.float32)[-1]
    assert abs(one_by_one / exact - 1) > 2e-6


def test_pairwise_sum_of_any_size():
    for size in (1, 2, 3, 31, 32, 33):
        assert float(pairwise_sum(jnp.ones(size))) == size
