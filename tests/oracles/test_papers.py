"""Properties that the oracles themselves must have."""

import numpy as np
import pytest

from tests.oracles import papers

STEPS, SHAPE = 9, (5, 4)
OPTIMIZERS = {
    "soap": lambda g: papers.soap(g, every=2),
    "kl_shampoo": lambda g: papers.kl_shampoo(g, every=2),
    "kl_soap": lambda g: papers.kl_soap(g, every=2),
    "record_19": papers.record_19,
    "record_27": papers.record_27,
    "asgo": lambda g: papers.asgo(g, every=3),
    "asgo_theory": papers.asgo_theory,
}


def gradients(shape=SHAPE):
    # Every direction in the first gradient too: eigenvectors of a null space would be arbitrary.
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for _ in range(STEPS)]


def rotation(n, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rotating_the_gradients_rotates_the_directions(name):
    grads = gradients((4, 4))
    left, right = rotation(4, 1), rotation(4, 2)
    plain = OPTIMIZERS[name](grads)
    rotated = OPTIMIZERS[name]([left @ g @ right for g in grads])
    assert len(plain) == STEPS and any(np.abs(u).max() > 0.1 for u in plain)
    for u, w in zip(plain, rotated, strict=True):
        np.testing.assert_allclose(w, left @ u @ right, atol=1e-6)


@pytest.mark.parametrize("name", ["soap", "kl_shampoo", "kl_soap", "record_19"])
def test_the_first_step_is_skipped(name):
    first, second = OPTIMIZERS[name](gradients())[:2]
    assert not first.any() and np.abs(second).max() > 0


def test_record_27_starts_with_the_polar_factor():
    # In the eigenbasis of its own gradient P is diagonal: U = .05 P / sqrt(.1 P^2).
    (update,) = papers.record_27(gradients()[:1])
    u, _, vt = np.linalg.svd(gradients()[0], full_matrices=False)
    np.testing.assert_allclose(update, 0.05 / np.sqrt(0.1) * u @ vt, atol=1e-6)


def test_soap_between_refreshes_is_adam_in_the_first_eigenbasis():
    grads = gradients()
    updates = papers.soap(grads, b1=0.9, b2=0.99, every=STEPS, eps=0.0)
    ql = np.linalg.eigh(grads[0] @ grads[0].T)[1]
    qr = np.linalg.eigh(grads[0].T @ grads[0])[1]
    m = v = np.zeros(SHAPE)
    for t, g in enumerate(grads[1:], start=1):
        p = ql.T @ g @ qr
        m, v = 0.9 * m + 0.1 * p, 0.99 * v + 0.01 * p**2
        adam = (m / (1 - 0.9**t)) / np.sqrt(v / (1 - 0.99**t))
        np.testing.assert_allclose(updates[t], ql @ adam @ qr.T, atol=1e-9)


def test_kl_soap_and_record_19_differ_by_weight_of_the_first_gradient_only():
    # qr(S Q) ignores the scale of S: with one refresh after the first gradient they agree,
    # and later the weight of that gradient tells them apart.
    options = {"b1": 0.95, "b2": 0.9, "every": STEPS}
    a, b = papers.kl_soap(gradients(), **options), papers.record_19(gradients(), **options)
    assert np.allclose(a, b)
    options["every"] = 1
    a, b = papers.kl_soap(gradients(), **options), papers.record_19(gradients(), **options)
    assert np.allclose(a[1], b[1]) and not np.allclose(a[3], b[3])


def test_asgo_of_a_constant_gradient_is_its_polar_factor():
    g = gradients((5, 5))[0]
    u, _, vt = np.linalg.svd(g)
    updates = papers.asgo([g] * 400, b1=0.9, b2=0.9)
    np.testing.assert_allclose(updates[-1], u @ vt, atol=1e-5)
    theory = papers.asgo_theory([g] * 4)
    np.testing.assert_allclose(theory[-1], u @ vt / 2, atol=1e-5)


def test_hyperball_keeps_the_norm():
    parameter, update = gradients()[:2]
    moved = papers.hyperball(parameter, update, 0.1)
    np.testing.assert_allclose(np.linalg.norm(moved), np.linalg.norm(parameter))
    assert np.sum((moved - parameter) * update) < 0
