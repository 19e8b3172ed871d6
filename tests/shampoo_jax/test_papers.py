"""The papers' algorithms against their numpy re-derivations, over several refreshes, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj
from tests.oracles import papers

STEPS = 12


def gradients(shape=(5, 5), steps=STEPS):
    """Correlated gradients. Square: the first one then fixes both eigenbases but for signs."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(shape[0],) * 2), rng.normal(size=(shape[1],) * 2)
    mean = rng.normal(size=shape)
    return [left @ (0.3 * mean + rng.normal(size=shape)) @ right for _ in range(steps)]


def directions(tx, grads):
    """Updates of a single matrix under jit."""
    with jax.enable_x64(True):
        params = {"w": jnp.zeros(grads[0].shape, jnp.float64)}
        state, update = tx.init(params), jax.jit(tx.update)
        updates = []
        for g in grads:
            u, state = update({"w": jnp.asarray(g)}, state, params)
            updates.append(np.asarray(u["w"]))
        return updates


ONE_SIDED = dict(bias_correction=False, solver=sj.TruncatedEigh(rtol=0.0))
BEFORE = dict(when="before", skip_first=False)
CASES = {
    "soap": (sj.scale_by_soap(0.9, 0.95, every=3), papers.soap, dict(b1=0.9, b2=0.95, every=3)),
    "kl_shampoo": (
        sj.scale_by_kl_shampoo(0.9, 0.95, every=3, max_scale="size"),
        papers.kl_shampoo,
        dict(b1=0.9, b2=0.95, every=3),
    ),
    "kl_soap": (
        sj.scale_by_kl_soap(0.9, 0.95, every=3),
        papers.kl_soap,
        dict(b1=0.9, b2=0.95, every=3),
    ),
    "record_27": (sj.scale_by_soap(**sj.presets.record_27()), papers.record_27, {}),
    "record_19": (sj.scale_by_kl_soap(**sj.presets.record_19()), papers.record_19, {}),
    "one_sided": (
        sj.scale_by_one_sided_shampoo(0.9, 0.95, **ONE_SIDED),
        papers.asgo,
        dict(b1=0.9, b2=0.95, eps=0.0),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_paper(name):
    tx, oracle, options = CASES[name]
    grads = gradients()
    for ours, theirs in zip(directions(tx, grads), oracle(grads, **options), strict=True):
        # eps = 1e-8 is added before or after a bias correction: a millionth where P is small.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6 * max(1, np.abs(theirs).max()))


def test_soap_adds_eps_where_the_authors_do():
    grads, options = gradients(), dict(b1=0.9, b2=0.95, every=3, eps=1.0)
    found = {
        hat: directions(sj.scale_by_soap(**options, eps_hat=hat), grads) for hat in (False, True)
    }
    expected = papers.soap(grads, **options)
    apart = [np.abs(u - e).max() for u, e in zip(found[False], expected, strict=True)]
    assert max(apart) > 0.1
    for ours, theirs in zip(found[True], expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if name != "one_sided"])
def test_a_wide_matrix_is_treated_as_its_transpose(name):
    # One more row than columns: a null space of two dimensions would have any basis at all.
    grads = gradients((5, 4))
    tall = directions(CASES[name][0], grads)
    wide = directions(CASES[name][0], [g.T for g in grads])
    for a, b in zip(tall, wide, strict=True):
        # What is rounding in the first bases, 1e-15, is divided by eps = 1e-8.
        np.testing.assert_allclose(a, b.T, rtol=0, atol=1e-6 * max(1, np.abs(b).max()))


def test_a_basis_that_stays_makes_two_routes_to_adam_equal():
    """in_eigenbasis(adam) and SOAP's two-input second moment agree until the first refresh."""
    grads = gradients()
    factors = sj.accumulate_factors(0.9)
    frozen = dict(every=100, refresh=sj.BasisRefresh(start=100, **BEFORE))
    general = sj.blocked(
        optax.chain(factors, sj.in_eigenbasis(optax.scale_by_adam(0.9, 0.95, eps=1e-8), **frozen))
    )
    second = sj.scale_by_second_moment(0.95, 1e-8)
    two_input = sj.blocked(
        optax.chain(sj.filter_gradient(0.9), factors, sj.eigenbasis(second, **frozen))
    )
    for a, b in zip(directions(general, grads), directions(two_input, grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_first_moments_are_carried_through_a_refresh():
    """Momentum inside the rotating basis equals momentum outside of it."""
    grads = gradients()

    refresh = sj.BasisRefresh(start=2, **BEFORE)

    def soap(*, inside):
        moment, second = sj.filter_gradient(0.9), sj.scale_by_second_moment(0.95, 1e-8)
        inner = optax.chain(moment, second) if inside else second
        parts = [sj.accumulate_factors(0.9), sj.eigenbasis(inner, every=2, refresh=refresh)]
        return sj.blocked(optax.chain(*([] if inside else [moment]), *parts))

    for a, b in zip(
        directions(soap(inside=True), grads), directions(soap(inside=False), grads), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-8)


def test_truncation_in_the_eigenbasis_stays_in_the_range():
    """Directions outside the range of the factors get no update, wherever momentum points."""
    rng = np.random.default_rng(1)
    range_left = np.linalg.qr(rng.normal(size=(8, 3)))[0]
    grads = [range_left @ rng.normal(size=(3, 6)) for _ in range(6)]
    tx = sj.scale_by_soap(
        0.9,
        0.9,
        every=1,
        basis="eigh",
        rtol=None,
        refresh=sj.BasisRefresh(reorder=False, **BEFORE),
    )
    for update in directions(tx, grads):
        outside = update - range_left @ (range_left.T @ update)
        assert np.abs(outside).max() < 1e-9 * np.abs(update).max()
