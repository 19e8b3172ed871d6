"""Roots by one QR step from the basis before, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shampoo_jax as sj

RNG = np.random.default_rng(0)
A = RNG.normal(size=(3, 2, 5, 5))
A = A @ A.swapaxes(-1, -2)  # three refreshes of two factors


def oracle(factors, q, exponent, damping=0.0, floor=0.0, eps=0.0):
    for a in factors:
        x = a + damping * np.eye(len(a))
        q = np.linalg.qr(x @ q)[0]
        d = np.maximum(np.diag(q.T @ x @ q), floor) ** -exponent
        yield q @ np.diag(d) @ q.T * len(a) ** 0.5 / (np.linalg.norm(d) + eps)


@pytest.mark.parametrize("options", [{}, {"damping": 0.1, "floor": 0.5, "eps": 0.01}])
def test_three_refreshes_equal_numpy(options):
    with jax.enable_x64(True):
        solver = sj.IteratedRoot(seed=3, **options)
        state, found = solver.init(2, 5, np.float64), []
        first = np.asarray(state[0])
        np.testing.assert_allclose(first.T @ first, np.eye(5), atol=1e-14)
        for a in A:
            root, ok, state = solver(jnp.asarray(a), 0.3, state)
            assert ok.all()
            found.append(np.asarray(root))
        for block in (0, 1):
            expected = [*oracle(A[:, block], first, 0.3, **options)]
            np.testing.assert_allclose(np.stack(found)[:, block], expected, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_factors_does_not_matter(scale):
    solver = sj.IteratedRoot()
    q = solver.init(2, 5, np.float32)
    a = jnp.float32(A[0])
    np.testing.assert_allclose(
        solver(scale * a, 0.5, q)[0], solver(a, 0.5, q)[0], rtol=1e-3, atol=1e-4
    )


def test_zero_and_what_is_not_finite():
    solver = sj.IteratedRoot()
    q = solver.init(1, 3, np.float32)
    root, ok, basis = solver(jnp.zeros((1, 3, 3)), 0.5, q)
    np.testing.assert_allclose(root[0], np.eye(3), atol=1e-6)
    np.testing.assert_array_equal(basis, q)
    assert ok.all() and not solver(jnp.full((1, 3, 3), jnp.nan), 0.5, q)[1].any()
