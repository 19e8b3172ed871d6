"""The recipe's direction: what it is without factors, and as the entry that it came from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shampoo_jax
from nanogpt.config.settings import MuonConfig, ShampooConfig, ShampooNextConfig
from nanogpt.optimizers.build import REGISTRY
from nanogpt.optimizers.shampoo_next import two_scales

GRADIENTS = np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32)


def updates_of(name, settings):
    tx = REGISTRY[name](settings, None)
    params = {"w": jnp.ones((6, 4))}
    state, update, out = tx.init(params), jax.jit(tx.update), []
    for g in GRADIENTS:
        u, state = update({"w": g}, state, params)
        out.append(u["w"])
    return np.stack(out)


ASPECT = {"exponent": None, "orthogonalize": True, "size": "aspect"}
MUON = MuonConfig(0.1, 0.0, ns_steps=12, ns_coeffs=(2.0, -1.5, 0.5))
THIRD = ShampooConfig(0.1, 0.0, b1=0.95, exponent=1 / 3, size="rows")
GRAFTED = ShampooConfig(0.1, 0.0, b1=0.95, exponent=0.25, graft_eps=1e-15)


@pytest.mark.parametrize(
    ("fields", "name", "same"),
    [
        (ASPECT, "muon_track3", MUON),
        ({"momentum": "average"}, "shampoo", THIRD),
        ({"momentum": "average", "exponent": 0.25, "size": "adam"}, "shampoo", GRAFTED),
    ],
)
def test_it_is_what_it_came_from(fields, name, same):
    found = updates_of("shampoo_next", ShampooNextConfig(0.1, 0.0, **fields))
    np.testing.assert_allclose(found, updates_of(name, same), rtol=0, atol=3e-5)


def test_norms_and_floors():
    fields = [{"size": "rows"}, {"size": "entries"}, {"floor": 2.0}]
    for more, norm in zip(fields, (2.0, 0.2 * 24**0.5, 2 * 24**0.5), strict=True):
        found = updates_of("shampoo_next", ShampooNextConfig(0.1, 0.0, **more))
        np.testing.assert_allclose(np.linalg.norm(found, axis=(1, 2)), norm, rtol=1e-5)


def test_factors_of_the_momentum_differ_from_those_of_the_gradient():
    mine, usual = (
        updates_of("shampoo_next", ShampooNextConfig(0.1, 0.0, squares=squares, b1=0.5))
        for squares in ("momentum", "gradient")
    )
    np.testing.assert_allclose(mine[0], usual[0], rtol=0, atol=1e-4)  # the same but for size
    assert np.abs(mine[2] - usual[2]).max() > 1e-2


def test_two_scales_mix_a_slower_average_in():
    tx = shampoo_jax.blocked(two_scales(0.5))
    state, update = tx.init(jnp.zeros((6, 4))), jax.jit(tx.update)
    fast, slow, norm = 0.0, 0.0, np.linalg.norm
    for t, g in enumerate(GRADIENTS, start=1):
        found, state = update(g, state)
        fast, slow = 0.5 * fast + 0.5 * g, 0.9 * slow + 0.1 * g
        ahead, even = 0.5 * fast + 0.5 * g, slow / (1 - 0.9**t)
        mixed = 0.75 * ahead + 0.25 * even * norm(ahead) / norm(even)
        np.testing.assert_allclose(found, mixed * norm(ahead) / norm(mixed), rtol=0, atol=1e-5)
