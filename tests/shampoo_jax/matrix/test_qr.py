"""Eigenbasis refreshes against the literal iteration in numpy, and their properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from shampoo_jax.matrix import qr
from shampoo_jax.matrix.qr import adaptive_eigh, off_diagonal_ratio, orthogonal_iteration

N = 6


def symmetric(*stack, seed=0):
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(*stack, N, N))
    return half @ half.swapaxes(-1, -2)


def orthogonal(*stack, seed=1):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(*stack, N, N)))[0]


def near_eigenbasis(matrix, angle, seed=2):
    """Eigenvectors turned by a small rotation."""
    _, basis = np.linalg.eigh(matrix)
    skew = np.random.default_rng(seed).normal(size=(N, N))
    return basis @ np.linalg.qr(np.eye(N) + angle * (skew - skew.T))[0]


def ratio(b):
    return np.sqrt(np.sum(b**2) - np.sum(np.diag(b) ** 2)) / np.linalg.norm(b)


def oracle(a, q, iterations, tolerance):
    b = q.T @ a @ q
    for _ in range(iterations):
        if ratio(b) <= tolerance:
            break
        u, r = np.linalg.qr(b)
        b, q = r @ u, q @ u
    order = np.argsort(np.diag(b), kind="stable")
    return np.diag(b)[order], q[:, order]


def assert_same_columns(actual, expected, tolerance=1e-9):
    actual = np.asarray(actual)
    signs = np.sign(np.sum(actual * expected, axis=-2, keepdims=True))
    np.testing.assert_allclose(actual * signs, expected, atol=tolerance)


@pytest.mark.parametrize(("iterations", "tolerance"), [(0, 0.0), (1, 0.0), (4, 0.0), (40, 0.02)])
def test_iteration_of_a_stack_equals_one_matrix_at_a_time(iterations, tolerance):
    factors = symmetric(4)
    # The first is close enough to need no iteration, the others differ in how many they need.
    bases = np.stack([near_eigenbasis(a, t) for a, t in zip(factors, (0, 0.1, 1, 5), strict=True)])
    with jax.enable_x64(True):
        values, basis = jax.jit(orthogonal_iteration, static_argnums=2)(
            jnp.asarray(factors), jnp.asarray(bases), iterations, tolerance
        )
    for i in range(4):
        expected_values, expected_basis = oracle(factors[i], bases[i], iterations, tolerance)
        np.testing.assert_allclose(values[i], expected_values, rtol=1e-9)
        assert_same_columns(basis[i], expected_basis)


def test_one_iteration_is_a_qr_of_the_factor_times_the_basis():
    factor, old = symmetric(), orthogonal()
    with jax.enable_x64(True):
        values, basis = orthogonal_iteration(jnp.asarray(factor), jnp.asarray(old))
    power, _ = np.linalg.qr(factor @ old)
    order = np.argsort(np.diag(power.T @ factor @ power))
    assert_same_columns(basis, power[:, order])
    np.testing.assert_allclose(values, np.sort(np.diag(power.T @ factor @ power)), rtol=1e-9)


def test_many_iterations_are_an_eigendecomposition():
    factor = symmetric(2, 3)
    with jax.enable_x64(True):
        values, basis = orthogonal_iteration(
            jnp.asarray(factor), jnp.asarray(orthogonal(2, 3)), 4000, 1e-11
        )
        ratios = np.asarray(off_diagonal_ratio(factor, basis))
    np.testing.assert_allclose(values, np.linalg.eigvalsh(factor), rtol=1e-8)
    assert ratios.max() < 1e-10


def test_a_basis_stays_orthogonal_and_float32():
    factor = jnp.asarray(symmetric(3), jnp.float32)
    values, basis = orthogonal_iteration(factor, jnp.asarray(orthogonal(3), jnp.float32), 10)
    assert values.dtype == basis.dtype == jnp.float32
    products = np.asarray(basis).swapaxes(-1, -2) @ np.asarray(basis)
    np.testing.assert_allclose(products, np.tile(np.eye(N), (3, 1, 1)), atol=2e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_ratio_ignores_scale(scale):
    factor, basis = symmetric(), orthogonal()
    actual = off_diagonal_ratio(jnp.asarray(factor * scale, jnp.float32), jnp.asarray(basis))
    np.testing.assert_allclose(actual, ratio(basis.T @ factor @ basis), rtol=1e-5)


def test_the_ratio_resolves_small_angles_in_float32():
    # |B|^2 - |diag B|^2 in float32 could not tell this from zero.
    factor = np.diag(np.arange(1.0, N + 1)).astype(np.float32)
    factor[0, 1] = factor[1, 0] = 1e-6
    expected = np.sqrt(2) * 1e-6 / np.linalg.norm(factor)
    np.testing.assert_allclose(off_diagonal_ratio(factor, np.eye(N)), expected, rtol=1e-4)


def test_ties_and_zero_keep_their_order():
    factor = jnp.diag(jnp.array([2.0, 1.0, 2.0, 1.0, 2.0, 0.0]))
    values, basis = orthogonal_iteration(factor, jnp.eye(N), 3)
    assert values.tolist() == [0, 1, 1, 2, 2, 2]
    assert np.argmax(np.abs(basis), axis=0).tolist() == [5, 1, 3, 0, 2, 4]
    assert float(off_diagonal_ratio(jnp.zeros((N, N)), jnp.eye(N))) == 0
    values, basis = orthogonal_iteration(jnp.zeros((N, N)), jnp.eye(N))
    assert not values.any() and np.array_equal(basis, np.eye(N))


def test_adaptive_eigh_decomposes_only_stale_bases():
    factors = symmetric(2)
    bases = np.stack([near_eigenbasis(factors[0], 0.02), orthogonal()])
    with jax.enable_x64(True):
        ratios = np.asarray(off_diagonal_ratio(factors, bases))
        assert ratios[0] < 0.1 < ratios[1]
        values, basis = adaptive_eigh(jnp.asarray(factors), jnp.asarray(bases), 0.1)
        everything, _ = adaptive_eigh(jnp.asarray(factors), jnp.asarray(bases), 1.0)
        nothing, _ = adaptive_eigh(jnp.asarray(factors), jnp.asarray(bases), -1.0)
    rotated = bases.swapaxes(-1, -2) @ factors @ bases
    diagonals = np.diagonal(rotated, axis1=-2, axis2=-1)
    np.testing.assert_array_equal(basis[0], bases[0])
    np.testing.assert_allclose(values[0], diagonals[0], rtol=1e-12)
    expected_values, expected_basis = np.linalg.eigh(factors)
    np.testing.assert_allclose(values[1], expected_values[1], rtol=1e-10)
    assert_same_columns(basis[1], expected_basis[1])
    np.testing.assert_allclose(everything, diagonals, rtol=1e-12)
    np.testing.assert_allclose(nothing, expected_values, rtol=1e-10)


def test_inside_shard_map():
    mesh = jax.make_mesh((8,), ("owner",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("owner")
    factor, basis = (jnp.asarray(x, jnp.float32) for x in (symmetric(8), orthogonal(8)))
    for refresh in (
        lambda a, q: orthogonal_iteration(a, q, 3, 0.1),
        lambda a, q: adaptive_eigh(a, q, 0.1),
    ):
        sharded = jax.shard_map(refresh, mesh=mesh, in_specs=spec, out_specs=spec)
        actual, expected = jax.jit(sharded)(factor, basis), refresh(factor, basis)
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-3, atol=1e-4)


def test_a_completed_basis_follows_from_the_columns_that_stay():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        basis = jnp.asarray(np.linalg.qr(rng.normal(size=(2, 6, 6)))[0])
        keep = jnp.array([[True, False, True, False, False, True], [False] * 6])
        # The same columns to be kept, signs aside, and any others beside them.
        turned = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        other = np.array(basis)
        other[0][:, [1, 3, 4]] = basis[0][:, [1, 3, 4]] @ turned
        other[0][:, 0] *= -1
        other[1] = np.eye(6)
        pair = qr.completed(basis, keep), qr.completed(jnp.asarray(other), keep)
    found, again, basis = map(np.asarray, (*pair, basis))
    np.testing.assert_array_equal(found[0][:, [0, 2, 5]], basis[0][:, [0, 2, 5]])
    np.testing.assert_allclose(
        found.swapaxes(1, 2) @ found, np.broadcast_to(np.eye(6), (2, 6, 6)), atol=1e-14
    )
    np.testing.assert_allclose(np.abs(again), np.abs(found), atol=1e-13)
    assert np.abs(other[0] - found[0]).max() > 0.1
