"""The correction of inverse powers for noise, against sampling and against its formula."""

import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_jax.matrix.eigh import shifted_root, truncated_root
from shampoo_jax.matrix.noise import debiased, energy_variance

RNG = np.random.default_rng(0)
SAMPLES = RNG.normal(size=(2, 5, 4, 3)).astype(np.float32)  # two matrices of five microbatches


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_the_correction_takes_most_of_the_bias_away(exponent):
    noisy = 2.0 + 0.2 * RNG.normal(size=100_000)
    plain = noisy**-exponent
    corrected = debiased(jnp.asarray(plain), exponent, jnp.asarray(0.04))
    bias = [abs(float(np.mean(x)) - 2.0**-exponent) for x in (plain, corrected)]
    assert bias[1] < bias[0] / 4


def test_the_variance_of_energies_is_that_of_their_mean_over_microbatches():
    basis = np.linalg.qr(RNG.normal(size=(2, 4, 4)))[0]
    found = energy_variance(jnp.asarray(SAMPLES), jnp.asarray(basis), jnp.full((2, 1, 1), 2.0))
    for n in range(2):
        energies = ((basis[n].T @ SAMPLES[n]) ** 2).sum(-1) / 2  # [m, d]
        np.testing.assert_allclose(found[n], energies.var(0, ddof=1) / 5, rtol=1e-4)


def corrected_in_numpy(factor, samples, exponent, lift=0.0):
    values, q = np.linalg.eigh(factor.astype(np.float64))
    values = values + lift
    variance = ((q.T @ samples) ** 2).sum(-1).var(0, ddof=1) / len(samples)
    second = exponent * (exponent + 1) / 2 * values ** -(exponent + 2)
    return (q * np.maximum(values**-exponent - second * variance, 0)) @ q.T


@pytest.mark.parametrize("exponent", [0.25, 1 / 3, 1.0])
def test_roots_are_corrected_in_each_eigendirection(exponent):
    factors = np.einsum("nmij,nmkj->nik", SAMPLES, SAMPLES) / 5 + 0.5 * np.eye(4)
    given = {"samples": jnp.asarray(SAMPLES)}
    truncated, ok = truncated_root(jnp.asarray(factors), exponent, **given)
    shifted, _ = shifted_root(jnp.asarray(factors), exponent, damping=0.3, before=False, **given)
    assert ok.all()
    for n in range(2):
        expected = corrected_in_numpy(factors[n], SAMPLES[n], exponent)
        np.testing.assert_allclose(truncated[n], expected, rtol=1e-4, atol=1e-5)
        expected = corrected_in_numpy(factors[n], SAMPLES[n], exponent, 0.3)
        np.testing.assert_allclose(shifted[n], expected, rtol=1e-4, atol=1e-5)


def test_what_is_cut_off_stays_so_and_scale_does_not_matter():
    samples = np.concatenate([SAMPLES[:1], np.zeros((1, 5, 2, 3), np.float32)], 2)  # [1, 5, 6, 3]
    factor = np.einsum("nmij,nmkj->nik", samples, samples) / 5
    for scale in (1.0, 2.0**20, 2.0**-20):
        root, _ = truncated_root(
            jnp.asarray(scale**2 * factor), 0.25, samples=jnp.asarray(scale * samples)
        )
        found = np.asarray(root) * scale**0.5
        np.testing.assert_allclose(found[0, 4:], 0, atol=1e-6)
        expected = corrected_in_numpy(factor[0, :4, :4], samples[0, :, :4], 0.25)
        np.testing.assert_allclose(found[0, :4, :4], expected, rtol=1e-3, atol=1e-4)
