"""Blends with the size of the update kept, and the gate of cosines, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj
from shampoo_jax.blocks.blocks import Blocks

RNG = np.random.default_rng(0)
G, R, D = RNG.normal(size=(3, 4, 3, 5))  # gradients, updates and directions of four blocks


def schatten4(x):
    return (np.linalg.svd(x, compute_uv=False) ** 4).sum(-1) ** 0.25


NORM = {"schatten4": schatten4, "frobenius": lambda x: np.linalg.norm(x, axis=(1, 2))}


def made(part, gradient=G, update=R):
    with jax.enable_x64(True):
        stacks = {"3x5": Blocks.of(jnp.asarray(gradient))}
        state = part.init(stacks)
        stacks["3x5"] = Blocks(jnp.asarray(gradient), jnp.asarray(update))
        new, state = part.update(stacks, state)
        assert int(state.count) == 1
        return new["3x5"]


def direction(values=D):
    give = optax.stateless(
        lambda tree, _: jax.tree.map(lambda u: jnp.asarray(values, u.dtype), tree)
    )
    return sj.on_updates(give)


def at_size(x, like, norm):
    return x * (NORM[norm](like) / NORM[norm](x))[:, None, None]


@pytest.mark.parametrize("norm", NORM)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_blend(norm, share):
    found = made(sj.blend(direction(), share, norm=norm)).update
    d = at_size(D, R, norm)
    np.testing.assert_allclose(found, at_size(R + share * (d - R), R, norm), rtol=1e-12)


def test_gate():
    def cos(x, y):
        return (x * y).sum((1, 2)) / np.linalg.norm(x, axis=(1, 2)) / np.linalg.norm(y, axis=(1, 2))

    d = np.stack([R[0], R[1] + 0.5 * D[1], G[2] + R[2], -R[3]])  # trusted in full, partly, not
    found = made(sj.trust_gate(direction(d), 0.2, floor=0.1, cap=0.9), G + 0.5 * R)
    g = G + 0.5 * R
    share = np.clip((cos(d, R) - 0.2) / 0.8, 0, 1) * np.clip(cos(d, g) / cos(R, g), 0, 1)
    share = np.clip(share, 0.1, 0.9)
    np.testing.assert_allclose(found.figures["gate"], share, rtol=1e-12)
    assert len(set(share)) > 2 and {0.1, 0.9} < set(share)
    sized = at_size(d, R, "schatten4")
    mixed = R + share[:, None, None] * (sized - R)
    np.testing.assert_allclose(found.update, at_size(mixed, R, "schatten4"), rtol=1e-10)


def test_shares_follow_schedules():
    part = sj.trust_gate(direction(-R), floor=lambda step: 0.25 + step, cap=1.0)
    np.testing.assert_array_equal(made(part).figures["gate"], 0.25)
    part = sj.blend(direction(), optax.linear_schedule(0.5, 1.0, 3))
    np.testing.assert_array_equal(made(part).figures["gate"], 0.5)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("make", [sj.blend, sj.trust_gate])
def test_the_scale_of_gradients_does_not_matter(make, scale):
    """Also where their fourth powers are outside of the range of float32."""
    part = make(direction(D.astype(np.float32)))
    new = {}
    for k in (1.0, scale):
        g, r = np.float32(k * G), np.float32(k * R)
        stacks = {"3x5": Blocks(jnp.asarray(g), jnp.asarray(r))}
        new[k] = np.asarray(part.update(stacks, part.init(stacks))[0]["3x5"].update) / k
    assert np.isfinite(new[scale]).all()
    np.testing.assert_allclose(new[scale], new[1.0], rtol=1e-4)


def test_zero_updates_and_zero_directions():
    for make in (sj.blend, sj.trust_gate):
        np.testing.assert_array_equal(made(make(direction()), update=0 * R).update, 0)
        np.testing.assert_array_equal(made(make(direction(0 * D))).update, R)
    # Half of each, which cancel.
    np.testing.assert_array_equal(made(sj.blend(direction(-R), 0.5, norm="frobenius")).update, R)


def test_until_a_direction_is_ready_the_update_stays():
    """SOAP's first gradient only fills its state."""
    soap = sj.eigenbasis(sj.of_updates(sj.scale_by_second_moment(0.9)), refresh=sj.BasisRefresh())
    parts = (sj.nesterov_average(0.5), sj.accumulate_factors(0.9), sj.blend(soap))
    tx, g = sj.blocked(optax.chain(*parts)), {"w": jnp.float32(G[0])}
    first, state = tx.update(g, tx.init(g))
    np.testing.assert_allclose(first["w"], 0.75 * g["w"], rtol=1e-6)
    second, _ = tx.update(g, state)
    assert not np.allclose(second["w"] / second["w"][0, 0], g["w"] / g["w"][0, 0], rtol=1e-2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sj.blend(direction(), 1.5), "share=1.5 must lie in"),
        (lambda: sj.blend(direction(), norm="spectral"), "norm='spectral': use one of"),
        (lambda: sj.trust_gate(direction(), 1.0), "least=1.0 must lie in"),
        (lambda: sj.trust_gate(direction(), cap=-1.0), "cap=-1.0 must lie in"),
        (lambda: sj.trust_gate(lambda x: x), "direction=.* is no Optax transformation"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
