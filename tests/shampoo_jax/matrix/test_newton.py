"""Coupled Newton roots against the literal iteration in numpy, and their properties."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from shampoo_jax.matrix.newton import coupled_higher_order, coupled_newton, rational_root

newton = jax.jit(coupled_newton, static_argnames=("root", "max_iterations"))
higher_order = jax.jit(
    coupled_higher_order, static_argnames=("exponent", "max_iterations", "order")
)


def spd(*shape, condition=1e3, seed=0):
    """A stack of symmetric matrices with eigenvalues from 1 to 1/condition."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(*shape, shape[-1])))
    values = np.geomspace(1, 1 / condition, shape[-1])
    return (basis * values) @ basis.swapaxes(-1, -2)


def exact_root(matrix, exponent):
    values, basis = np.linalg.eigh(matrix)
    return (basis * values[..., None, :] ** -exponent) @ basis.swapaxes(-1, -2)


def newton_oracle(a, p, damping, max_iterations, tolerance):
    """One matrix, literally as written in the docstring."""
    eye = np.eye(len(a))
    a = a + damping * eye
    z = (p + 1) / (2 * np.linalg.norm(a))
    x, m, steps = z ** (1 / p) * eye, z * a, 0
    while np.max(np.abs(m - eye)) > tolerance and steps < max_iterations:
        t = (1 + 1 / p) * eye - m / p
        x, m, steps = x @ t, np.linalg.matrix_power(t, p) @ m, steps + 1
    return x, steps


def higher_order_oracle(a, p, q, rel, absolute, order, tolerance, max_iterations=100):
    eye = np.eye(len(a))
    a = a + max(rel * np.max(np.sum(np.abs(a), axis=1)), absolute) * eye
    z = 1 / np.trace(a)
    x, m, steps = z ** (1 / p) * eye, z * a, 0
    t = (1 + 1 / p) * eye - m / p
    x, m = x @ t, np.linalg.matrix_power(t, p) @ m
    error = np.max(np.abs(m - eye))
    b = [math.prod((1 + (j - 1) * p) / (j * p) for j in range(1, i + 1)) for i in range(order)]
    while error > tolerance and steps < max_iterations:
        t = sum(b[i] * np.linalg.matrix_power(eye - m, i) for i in range(order))
        x, m, steps = x @ t, np.linalg.matrix_power(t, p) @ m, steps + 1
        new = np.max(np.abs(m - eye))
        if new > 1.2 * error or (new == error and error < 1e-3):
            break
        error = new
    return np.linalg.matrix_power(x, q), steps


# Different condition numbers: the matrices of one stack need different numbers of iterations.
STACK = np.stack([spd(6, condition=c, seed=i) for i, c in enumerate((1.5, 1e2, 1e6))])


@pytest.mark.parametrize(("p", "damping"), [(1, 0.0), (2, 1e-3), (3, 0.0), (4, 1e-2)])
def test_newton_stack_equals_one_matrix_at_a_time(p, damping):
    with jax.enable_x64(True):
        result = newton(jnp.asarray(STACK), p, damping, tolerance=1e-9)
    assert len(set(result.iterations.tolist())) > 1
    for i, matrix in enumerate(STACK):
        root, steps = newton_oracle(matrix, p, damping, 100, 1e-9)
        np.testing.assert_allclose(result.root[i], root, rtol=1e-9, atol=1e-9 * np.abs(root).max())
        assert result.iterations[i] == steps
    assert result.ok.all()


@pytest.mark.parametrize(("order", "exponent"), [(2, 1 / 2), (3, 1 / 3), (4, 0.4), (5, 0.75)])
def test_higher_order_stack_equals_one_matrix_at_a_time(order, exponent):
    rel, absolute = np.array([0.0, 1e-3, 0.0]), np.array([1e-2, 1e-9, 0.0])
    ratio = rational_root(exponent)
    with jax.enable_x64(True):
        result = higher_order(jnp.asarray(STACK), exponent, rel, absolute, order=order)
    assert result.ok.all()
    for i, matrix in enumerate(STACK):
        root, steps = higher_order_oracle(
            matrix, ratio.numerator, ratio.denominator, rel[i], absolute[i], order, 1e-8
        )
        # The last bits of an error near 1e-13 decide the early stop.
        assert abs(int(result.iterations[i]) - steps) <= 1
        np.testing.assert_allclose(result.root[i], root, rtol=1e-7, atol=1e-7 * np.abs(root).max())


@pytest.mark.parametrize("exponent", [1, 1 / 6, 0.4, 0.75, 2, 3 / 7])
def test_higher_order_is_the_inverse_root(exponent):
    matrix = spd(2, 3, 5)
    with jax.enable_x64(True):
        result = higher_order(jnp.asarray(matrix), exponent, 0.0, 0.0)
    assert result.root.shape == (2, 3, 5, 5) and result.ok.shape == (2, 3) and result.ok.all()
    expected = exact_root(matrix, exponent)
    np.testing.assert_allclose(result.root, expected, atol=1e-9 * np.abs(expected).max())


def both(factor, p=4, rel=0.0, damping=0.0):
    """Both solvers, always on float32[3, 4, 4] where a test allows it: one compilation each."""
    factor = jnp.asarray(factor, jnp.float32)
    # Coupled Newton has no relative damping; these tests damp it only absolutely.
    return newton(factor, p, float(damping)), higher_order(
        factor, 1 / p, float(rel), float(damping)
    )


@pytest.mark.parametrize("p", [1, 4])
def test_power_of_the_root_times_the_factor_is_the_identity_in_float32(p):
    matrix = spd(3, 4, condition=50)
    for result in both(matrix, p):
        assert result.root.dtype == jnp.float32 and result.ok.all()
        power = np.linalg.matrix_power(np.asarray(result.root, np.float64), p)
        np.testing.assert_allclose(power @ matrix, np.tile(np.eye(4), (3, 1, 1)), atol=2e-4)


@pytest.mark.parametrize("log2", [-100, 4, 100])
def test_scaling_the_factor_scales_the_root(log2):
    # 2^(+-100): the squares inside a Frobenius norm of the unscaled factor would leave float32.
    matrix, scale = spd(3, 4, condition=50), 2.0**log2
    plain = both(matrix, rel=1e-4, damping=1e-3)
    scaled = both(matrix * scale, rel=1e-4, damping=1e-3 * scale)
    for before, after in zip(plain, scaled, strict=True):
        assert after.ok.all()
        expected = np.asarray(before.root) * scale**-0.25
        np.testing.assert_allclose(after.root, expected, rtol=1e-5, atol=1e-5 * expected.max())


def test_identity_and_zero():
    # The root of the zero matrix is zero, as for the truncated eigenvalue solver.
    factor = np.stack([np.eye(4), np.zeros((4, 4)), 16 * np.eye(4)])
    for result in both(factor):
        assert result.ok.all()
        expected = np.stack([np.eye(4), np.zeros((4, 4)), np.eye(4) / 2])
        np.testing.assert_allclose(result.root, expected, atol=1e-6)
        assert not result.root[1].any()


def test_damped_zero_has_the_root_of_the_damping():
    for result in both(np.zeros((3, 4, 4)), damping=1e-8):
        np.testing.assert_allclose(result.root, np.tile(100 * np.eye(4), (3, 1, 1)), rtol=1e-5)


def test_one_by_one():
    for result in both([[[16.0]], [[1e-4]]]):
        np.testing.assert_allclose(result.root, [[[0.5]], [[10.0]]], rtol=1e-5)
        assert result.ok.all()


BROKEN = {
    # A row and a column of zeros stay zero in every product, whatever the order of its sums; of a
    # rotated one the last eigenvalue is rounding, and where that is positive there is a root.
    "singular": np.pad(spd(3, condition=10), ((0, 1), (0, 1))),
    "indefinite": spd(4, condition=10) - 0.5 * np.eye(4),
    "nan": np.diag([1, 1, 1, np.nan]),
    "inf": np.diag([1, 1, 1, np.inf]),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_factor_without_root_fails_alone(broken):
    good = spd(4, condition=10)
    for result in both(np.stack([good, broken, good])):
        assert result.ok.tolist() == [True, False, True]
        np.testing.assert_allclose(result.root[2], exact_root(good, 0.25), rtol=1e-4, atol=1e-4)


def test_too_few_iterations_fail_unless_any_finite_root_is_accepted():
    matrix = jnp.asarray(spd(4, condition=1e4), jnp.float32)
    assert not newton(matrix, 4, 0.0, max_iterations=3).ok
    accepted = newton(matrix, 4, 0.0, max_iterations=3, max_residual=math.inf)
    assert accepted.ok and accepted.iterations == 3


def test_inside_shard_map():
    matrix = jnp.asarray(spd(8, 4), jnp.float32)
    mesh = jax.make_mesh((8,), ("owner",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("owner")
    sharded = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec))
    for actual, expected in zip(sharded(matrix), both(matrix), strict=True):
        np.testing.assert_allclose(actual.root, expected.root, rtol=1e-4, atol=1e-4)


def test_rational_roots():
    found = [rational_root(e) for e in (0.5, 1 / 3, 1 / 6, 0.4, 0.75, 2.0, 1.0)]
    assert found == [2, 3, 6, Fraction(5, 2), Fraction(4, 3), Fraction(1, 2), 1]


@pytest.mark.parametrize("exponent", [0.0, -0.5, math.pi / 10, 1 / 65, 0.3333])
def test_irrational_exponents_are_refused(exponent):
    with pytest.raises(ValueError, match="eigenvalue solver|must be positive"):
        coupled_higher_order(jnp.eye(2), exponent, 0.0, 0.0)


@pytest.mark.parametrize("root", [Fraction(5, 2), 0, -2])
def test_newton_refuses_roots_that_are_no_positive_integer(root):
    with pytest.raises(ValueError, match="coupled_higher_order|must be positive"):
        coupled_newton(jnp.eye(2), root, 0.0)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        coupled_newton(jnp.zeros((2, 3)), 2, 0.0)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        coupled_higher_order(jnp.zeros(3), 0.5, 0.0, 0.0)
    with pytest.raises(ValueError, match="order=1"):
        coupled_higher_order(jnp.eye(2), 0.5, 0.0, 0.0, order=1)
