"""Orthogonalized updates against numpy in float64, and their properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_jax.matrix.orthogonalize import newton_schulz, svd_orthogonalize

CONVERGENT = (1.5, -0.5, 0.0)


def update(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def oracle(f, steps, a, b, c):
    """The same odd polynomials of the singular values."""
    u, s, vt = np.linalg.svd(f, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u * s @ vt


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (1, 3), (1, 1)])
def test_newton_schulz_is_a_polynomial_of_singular_values(shape):
    with jax.enable_x64(True):
        stack = jnp.asarray(update(2, 3, *shape))
        actual = jax.jit(newton_schulz)(stack)
        converged = newton_schulz(stack, 60, CONVERGENT)
        polar = svd_orthogonalize(stack)
    for index in np.ndindex(2, 3):
        expected = oracle(np.asarray(stack[index]), 5, 3.4445, -4.775, 2.0315)
        np.testing.assert_allclose(actual[index], expected, atol=1e-12)
    np.testing.assert_allclose(converged, polar, atol=1e-9)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_svd_gives_orthonormal_sides_times_the_nuclear_norm(shape):
    with jax.enable_x64(True):
        stack = jnp.asarray(update(3, *shape))
        polar = np.asarray(svd_orthogonalize(stack))
        scaled = np.asarray(svd_orthogonalize(stack, scale_by_nuclear_norm=True))
    small = polar if shape[0] < shape[1] else polar.swapaxes(-1, -2)
    identity = np.tile(np.eye(4), (3, 1, 1))
    np.testing.assert_allclose(small @ small.swapaxes(-1, -2), identity, atol=1e-12)
    stack = np.asarray(stack)
    nuclear = np.linalg.svd(stack, compute_uv=False).sum(-1)
    np.testing.assert_allclose(scaled, polar * nuclear[:, None, None], rtol=1e-12)
    # The inner product of update and polar factor is the nuclear norm.
    np.testing.assert_allclose(np.sum(polar * stack, axis=(-2, -1)), nuclear, rtol=1e-12)


@pytest.mark.parametrize("log2", [-100, -20, 40, 100])
def test_scale_does_not_matter_and_float32_stays(log2):
    matrix = update(6, 4).astype(np.float32)
    for solve in (newton_schulz, svd_orthogonalize):
        actual = solve(jnp.asarray(matrix * np.float32(2.0**log2)), **small_eps(solve))
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, solve(jnp.asarray(matrix)), atol=1e-5)


def small_eps(solve):
    return {"eps": 1e-35} if solve is newton_schulz else {}


def test_eps_is_the_floor_of_the_norm():
    matrix = update(3, 3) * 1e-4
    with jax.enable_x64(True):
        actual = newton_schulz(jnp.asarray(matrix), 0, eps=1.0)
    np.testing.assert_allclose(actual, matrix, rtol=1e-12)


def test_zero_stays_zero():
    assert not newton_schulz(jnp.zeros((2, 3, 4))).any()
    assert not svd_orthogonalize(jnp.zeros((2, 3, 4))).any()
