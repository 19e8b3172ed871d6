"""Roots by eigendecomposition against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_jax.matrix import eigh

truncated_root = jax.jit(eigh.truncated_root, static_argnames=("exponent", "rtol", "atol"))
shifted_root = jax.jit(eigh.shifted_root, static_argnames=("exponent", "damping", "before"))
EPS = float(np.finfo(np.float32).eps)


def with_spectrum(values, seed=0, dtype=np.float32):
    """A symmetric matrix with these eigenvalues, rounded to dtype."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values),) * 2))[0]
    a = (q * np.asarray(values, np.float64)) @ q.T
    return ((a + a.T) / 2).astype(dtype)


def power(a, function):
    w, q = np.linalg.eigh(a.astype(np.float64))
    return (q * function(w)) @ q.T


def truncated(a, exponent, rtol=0.0, atol=0.0):
    def function(w):
        keep = w > max(rtol * max(w.max(), 0.0), atol)
        return np.where(keep, np.where(keep, w, 1.0) ** -exponent, 0.0)

    return power(a, function)


def assert_near(actual, expected, rtol=2e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1 / 3, 1.0, 0.4])
def test_truncated_root_of_a_stack(exponent):
    stack = np.stack([with_spectrum(np.geomspace(1, 50, 6), i) for i in range(3)])
    root, ok = truncated_root(stack, exponent)
    assert root.dtype == jnp.float32
    assert ok.tolist() == [True] * 3
    for a, r in zip(stack, root, strict=True):
        assert_near(r, truncated(a, exponent))
    np.testing.assert_array_equal(root, root.swapaxes(1, 2))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_scales(scale):
    a = with_spectrum([0.5, 1, 2, 8])
    root, ok = truncated_root((a * np.float32(scale))[None], 0.25)
    assert ok[0]
    assert_near(root[0], truncated(a, 0.25) * scale**-0.25)
    damping = 0.1 * scale
    root, ok = shifted_root((a * np.float32(scale))[None], 0.25, damping=damping)
    assert ok[0]
    assert_near(root[0], power(a, lambda w: (w + 0.1) ** -0.25) * scale**-0.25)


def test_scaling_by_a_power_of_two_is_exact():
    a = with_spectrum([0, 1e-9, 1e-3, 1.0, 7.0])[None]
    root, _ = truncated_root(a, 0.25)
    scaled, _ = truncated_root(a * np.float32(2.0**40), 0.25)
    np.testing.assert_array_equal(scaled * np.float32(2.0**10), root)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_null_space_stays_null_by_default(rank):
    d = 24
    g = np.random.default_rng(rank).normal(size=(d, rank)).astype(np.float32)
    a = g @ g.T
    root, ok = truncated_root(a[None], 0.25)
    assert ok[0]
    assert_near(root[0], truncated(g.astype(np.float64) @ g.T, 0.25, 1e-9), 1e-4)
    assert np.linalg.matrix_rank(np.asarray(root[0], np.float64), tol=1e-3) == rank


@pytest.mark.trap("S2")
def test_zero_identity_and_one_by_one():
    root, ok = truncated_root(np.zeros((2, 3, 3), np.float32), 0.25)
    assert ok.all()
    np.testing.assert_array_equal(root, 0.0)
    root, ok = truncated_root(np.eye(5, dtype=np.float32)[None], 0.3)
    assert_near(root[0], np.eye(5), 1e-6)
    root, ok = truncated_root(np.float32([[[16.0]], [[0.0]], [[-1.0]]]), 0.25)
    np.testing.assert_allclose(root.ravel(), [0.5, 0, 0], rtol=1e-6)
    root, ok = shifted_root(np.zeros((1, 3, 3), np.float32), 0.5, damping=1e-4)
    assert ok[0]
    assert_near(root[0], 100 * np.eye(3), 1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_matrix_that_is_not_finite_fails_alone(bad):
    stack = np.stack([np.eye(3), 4 * np.eye(3), np.eye(3)]).astype(np.float32)
    stack[0, 1, 2] = bad
    for root, ok in (truncated_root(stack, 0.5), shifted_root(stack, 0.5, damping=1e-9)):
        assert ok.tolist() == [False, True, True]
        assert_near(root[1], np.eye(3) / 2, 1e-6)


def test_a_root_that_overflows_fails():
    _, ok = truncated_root(np.float32([[[1e-30]]]), 2.0)
    assert not ok[0]


SPECTRUM = [-0.5, -1e-6, 0.0, 1e-5, 1e-3, 0.1, 1.0, 4.0]


@pytest.mark.trap("S1")
@pytest.mark.parametrize(
    ("rtol", "atol", "kept"),
    [
        (0.0, 0.0, 5),  # "positive": everything above 0
        (1e-3, 0.0, 3),  # relative to the largest, 4
        (0.0, 0.05, 3),
        (1e-3, 0.5, 2),  # the larger of the two
        (0.02, 0.07, 3),  # not their sum
        (0.3, 1e-4, 1),
        (1.0, 0.0, 0),  # a value at the cutoff is dropped
        (None, 0.0, 5),  # d * eps
    ],
)
def test_cutoffs(rtol, atol, kept):
    values = np.float32(SPECTRUM)
    powers = eigh.truncated_power(jnp.asarray(values), 0.5, rtol=rtol, atol=atol)
    expected = [0.0] * (8 - kept) + list(values[8 - kept :].astype(np.float64) ** -0.5)
    np.testing.assert_allclose(powers, expected, rtol=1e-6)
    a = with_spectrum(SPECTRUM, dtype=np.float64)
    with jax.enable_x64(True):
        root, ok = eigh.truncated_root(jnp.asarray(a)[None], 0.5, rtol=rtol or 0.0, atol=atol)
    if kept < 5 and rtol != 1.0:  # elsewhere rounding decides about eigenvalues at the cutoff
        assert_near(root[0], truncated(a, 0.5, rtol or 0.0, atol), 1e-12)


def test_default_cutoff_is_the_dimension_times_eps():
    for d in (2, 16):
        edge = d * EPS
        values = jnp.asarray([0.0] * (d - 3) + [0.99 * edge, 1.01 * edge, 1.0][-d:], jnp.float32)
        assert int((eigh.truncated_power(values, 0.5) > 0).sum()) == 2
    with jax.enable_x64(True):
        values = jnp.asarray([1e-16, 1e-15, 1.0], jnp.float64)
        assert int((eigh.truncated_power(values, 0.5) > 0).sum()) == 2


def test_cutoff_of_each_matrix_is_its_own():
    values = jnp.float32([[1e-4, 1.0], [1e-4, 1e-3]])
    powers = eigh.truncated_power(values, 0.5, rtol=1e-2)
    np.testing.assert_allclose(powers, [[0, 1], [100, 1000**0.5]], rtol=1e-5)


def test_a_negative_definite_matrix_has_root_zero():
    root, ok = truncated_root(with_spectrum([-3, -2, -1])[None], 0.25)
    assert ok[0]
    np.testing.assert_array_equal(root[0], 0.0)


@pytest.mark.parametrize(
    ("values", "before", "moved"),
    [
        ([0.5, 2.0], True, [0.6, 2.1]),  # damping is in the matrix already
        ([0.0, 2.0], True, [0.1, 2.1]),
        ([-0.3, 2.0], True, [0.1, 2.4]),  # the whole spectrum moves, it is not clamped
        ([-0.05, 2.0], True, [0.1, 2.15]),
        ([0.5, 2.0], False, [0.6, 2.1]),
        ([-0.3, 2.0], False, [0.1, 2.4]),
    ],
)
def test_shift(values, before, moved):
    a = with_spectrum(values, dtype=np.float64)
    with jax.enable_x64(True):
        root, ok = eigh.shifted_root(jnp.asarray(a)[None], 0.5, damping=0.1, before=before)
    assert ok[0]
    w, q = np.linalg.eigh(a)
    np.testing.assert_allclose(root[0], (q * np.array(moved) ** -0.5) @ q.T, rtol=1e-10)


def test_eigh_of_any_leading_axes():
    a = np.stack([with_spectrum([1, 2, 3], i) for i in range(4)]).reshape(2, 2, 3, 3)
    values, vectors = jax.jit(eigh.eigh)(a)
    assert (values.shape, vectors.shape) == ((2, 2, 3), (2, 2, 3, 3))
    np.testing.assert_allclose(values, np.broadcast_to([1, 2, 3], (2, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(eigh.reconstruct(values, vectors), a, atol=1e-5)


def test_a_factor_at_the_upper_end_of_float32_has_a_root():
    """XLA may multiply by the inverse of the scale, which is denormal for 2^127."""
    factor = np.diag(np.float32([2.0**127, 2.0**123]))[None]
    root, ok = jax.jit(lambda a: eigh.truncated_root(a, 0.25))(factor)
    assert ok.all()
    assert_near(root[0], np.diag([2.0**-31.75, 2.0**-30.75]), 1e-6)


def test_power_of_two_scale():
    sizes = np.float32([0.0, 1.0, 1.5, 3.0, -8.0, 1e-30, 3e38])
    scale = np.asarray(eigh.power_of_two_scale(jnp.asarray(sizes)[:, None, None])).ravel()
    assert scale[0] == 1
    assert (np.frexp(scale)[0] == 0.5).all()
    ratio = np.abs(sizes[1:]) / scale[1:]
    assert ((ratio >= 0.5) & (ratio <= 2)).tolist() == [True] * 5 + [False]
    assert scale[-1] == 2.0**126
