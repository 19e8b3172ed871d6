"""Presets of Meta's forms against the trajectories of its package, on one matrix."""

import optax
import pytest

import shampoo_jax as sj
from scripts.maintenance import replay_golden
from tests.shampoo_jax.test_golden import FILES, only

ADAM = dict(graft=sj.scale_by_second_moment(0.95, 1e-8))
UNMERGED = sj.Blocking(merge=None, canonical=False, dimension_numbers=None)


@pytest.mark.parametrize(
    ("number", "preset"),
    [
        ("35", sj.presets.meta_eigendecomposed(damping=1e-4, every=2) | ADAM),
        ("36", sj.presets.meta_eigendecomposed(sj.QRBasis(), damping=1e-3) | ADAM),
        ("39", sj.presets.meta_kl_shampoo(damping=1e-2) | ADAM),
        ("40", sj.presets.meta_eigendecomposed_kl(damping=0.1) | dict(exponents={2: 0.5})),
    ],
)
def test_presets_of_meta_reproduce_its_trajectories(number, preset):
    direction = sj.scale_by_shampoo(**preset | dict(b2=0.95, blocking=UNMERGED))
    tx = optax.chain(direction, optax.scale_by_learning_rate(0.01))
    trajectory = only(replay_golden.load(FILES[number]), ["mat"])
    assert replay_golden.replay(trajectory, lambda config: tx) <= 1
