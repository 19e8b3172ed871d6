"""Minimax schedules: optimality, scalar errors, golden coefficients."""

import numpy as np
import pytest

from shampoo_jax.matrix import schedules

EPS = 2.0**-23

# Coefficients at size 768 in float32. Printed by these functions; their optimality and errors are
# tested below, so a change here that passes there may be an improvement.
GOLDEN_ROOT = (
    (3.9236, -17.6625, 25.6484, 0.0, -11.3776),
    (1.6384, -0.5985, 0.0888),
    (1.4304, -0.5731, 0.1453),
)
GOLDEN_SIGN = (
    (6.6313, -17.0726, 11.6493),
    (2.5759, -1.8825, 0.4315),
    (1.9397, -1.3155, 0.3779),
)
GOLDEN_POLISH = (1.5620, -0.9208, 0.3592)


def lifted(schedule, p, x):
    """Z and M of eigenvalues x."""
    z, m = np.ones_like(x), x
    for coefficients in schedule.steps:
        q = np.polyval(coefficients[::-1], m)
        z, m = z * q, m * q**p
    return z, m


@pytest.mark.parametrize(
    ("lower", "upper", "power", "exponents"),
    [(1e-4, 1.0, 0.25, (0, 1, 2, 4)), (0.3, 1.7, 0.5, (0, 1, 2)), (0.05, 1.03, 1.0, (0, 2, 4))],
)
def test_minimax_residual_alternates(lower, upper, power, exponents):
    """De la Vallee-Poussin: m + 1 alternating residuals of size E mean that none is better."""
    step = schedules.minimax(lower, upper, power, exponents)
    x = np.concatenate([np.geomspace(lower, upper, 20001), np.linspace(lower, upper, 20001)])
    x.sort()
    residual = 1 - x**power * np.polyval(step.coefficients[::-1], x)
    assert np.abs(residual).max() == pytest.approx(step.error, rel=1e-4)
    peaks = np.sign(residual[np.abs(residual) > step.error * (1 - 1e-3)])
    assert np.count_nonzero(np.diff(peaks)) == len(exponents)


def test_golden_schedule():
    schedule = schedules.cut_schedule(4, 768 * EPS, 3)
    for actual, expected in zip(schedule.steps, GOLDEN_ROOT, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-3)
    for actual, expected in zip(schedule.signs, GOLDEN_SIGN, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-3)
    np.testing.assert_allclose(schedule.polish, GOLDEN_POLISH, atol=1e-3)


@pytest.mark.parametrize(
    ("p", "n", "clip_steps", "cut_steps"),
    [
        (4, 768, 3, 3),
        (4, 3072, 3, 3),
        (4, 64, 4, 4),
        (2, 768, 4, 4),
        (3, 1024, 3, 3),
        (1, 768, 5, 5),
    ],
)
def test_scalar_errors(p, n, clip_steps, cut_steps):
    cutoff = n * EPS
    x = np.concatenate([[0.0], np.geomspace(1e-3 * cutoff, 1, 5000)])
    exact = np.maximum(x, cutoff) ** (-1 / p)

    clip = schedules.clip_schedule(p, cutoff)
    assert len(clip.steps) == clip_steps
    ratio = lifted(clip, p, x)[0] / exact
    away = (x < 0.1 * cutoff) | (x > 10 * cutoff)  # the kink itself is smoothed
    assert np.abs(ratio[away] - 1).max() < 0.065
    assert ratio.max() < 1.065 and ratio.min() > (0.65 if p == 1 else 0.8)

    cut = schedules.cut_schedule(p, cutoff, 3)
    assert len(cut.steps) == cut_steps
    z, m = lifted(cut, p, x)
    assert m.max() <= cut.largest
    half = np.polyval(cut.polish[::-1], m) * z
    s = (m - cut.images[-1]) / (cut.largest - cut.images[-1]) + 0.0125
    for a, b, c in cut.signs:
        s = s * (a + b * s**2 + c * s**4)
    ratio = half * ((1 + s) / 2) ** 2 / exact
    if p > 1:  # p = 1 takes a wider gap for a more exact projector
        assert np.abs(ratio[x > 1.06 * cutoff] - 1).max() < 0.06
        assert np.abs(ratio[x < 0.94 * cutoff]).max() < 0.06
    assert np.abs(ratio[x > 2 * cutoff] - 1).max() < (0.025 if p == 1 else 0.017)
    assert np.abs(ratio[0]) < 6e-5


def test_smaller_cutoffs_take_more_steps():
    counts = [len(schedules.cut_schedule(4, rtol, 3).steps) for rtol in (0.1, 1e-3, 1e-10, 1e-15)]
    assert counts == [1, 3, 7, 10]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_more_sign_steps_narrow_the_gap(count):
    def sign(x):
        for a, b, c in schedules.sign_schedule(count):
            x = x * (a + b * x**2 + c * x**4)
        return x

    gap = {2: 0.2, 3: 0.05, 4: 0.0125}[count]
    x = np.linspace(gap, 1.03, 20001)
    assert np.abs(sign(x) - 1).max() < 0.0101
    np.testing.assert_allclose(sign(-x), -sign(x), rtol=1e-12)
