"""Presets of Meta's forms against the trajectories of its package, on one matrix."""

import optax
import pytest

import shampoo_jax as sj
from scripts import replay_golden
from tests.shampoo_jax.test_golden import FILES, only

ADAM = dict(graft="adam", graft_b2=0.95, graft_eps=1e-8)


@pytest.mark.parametrize(
    ("number", "preset"),
    [
        ("35", sj.presets.meta_eigendecomposed(eps=1e-4, every=2) | ADAM),
        ("36", sj.presets.meta_eigendecomposed(sj.QRBasis(), eps=1e-3) | ADAM),
        ("39", sj.presets.meta_kl_shampoo(eps=1e-2) | ADAM),
        ("40", sj.presets.meta_eigendecomposed_kl(eps=0.1) | dict(exponents={2: 0.5})),
    ],
)
def test_presets_of_meta_reproduce_its_trajectories(number, preset):
    direction = sj.scale_by_shampoo(**preset | dict(b2=0.95, merge=None))
    tx = optax.chain(direction, optax.scale_by_learning_rate(0.01))
    trajectory = only(replay_golden.load(FILES[number]), ["mat"])
    assert replay_golden.replay(trajectory, lambda config: tx) <= 1
