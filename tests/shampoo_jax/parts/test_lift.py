"""Stock transformations as parts: what they see and change, and whom extra arguments reach."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj
from shampoo_jax.blocks.blocks import Blocks

RNG = np.random.default_rng(0)
GRADIENT, UPDATE, WEIGHTS = (jnp.asarray(RNG.normal(size=(2, 3, 4)), jnp.float32) for _ in range(3))


def stacks_of(gradient, update=None):
    blocks = Blocks.of(gradient)
    return {"3x4": dataclasses.replace(blocks, update=gradient if update is None else update)}


@pytest.mark.parametrize(
    ("lift", "gradient", "update"),
    [
        (sj.on_updates, GRADIENT, 2 * UPDATE),
        (sj.on_gradients, 2 * GRADIENT, UPDATE),
        (sj.from_gradients, GRADIENT, 2 * GRADIENT),
    ],
)
def test_each_lift_reads_and_writes_its_own_fields(lift, gradient, update):
    tx, stacks = lift(optax.scale(2.0)), stacks_of(GRADIENT, UPDATE)
    new, _ = tx.update(stacks, tx.init(stacks))
    np.testing.assert_array_equal(new["3x4"].gradient, gradient)
    np.testing.assert_array_equal(new["3x4"].update, update)


@pytest.mark.parametrize("lift", [sj.on_updates, sj.on_gradients, sj.from_gradients])
def test_parameters_arrive_as_stacks_of_arrays(lift):
    tx = sj.blocked(lift(optax.add_decayed_weights(0.5)), blocking=sj.Blocking(size=3))
    params = {"w": jnp.asarray(WEIGHTS[0]), "b": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    expected = jax.tree.map(jnp.zeros_like if lift is sj.on_gradients else lambda p: p / 2, params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


class Heard(NamedTuple):
    value: jax.Array


def listener():
    """Passes updates on, and keeps the extra argument `value`, which it cannot do without."""

    def update(updates, state, params=None, *, value, **extra):
        return updates, Heard(jnp.asarray(value, jnp.float32))

    return optax.GradientTransformationExtraArgs(lambda params: Heard(jnp.zeros([])), update)


def kl_factors(tx):
    return sj.accumulate_kl_factors(optax.chain(sj.on_updates(tx), sj.invert_roots()))


PLACES = {
    "on_updates": sj.on_updates,
    "on_gradients": sj.on_gradients,
    "from_gradients": sj.from_gradients,
    "a chain that is lifted": lambda tx: sj.on_updates(optax.chain(optax.clip(1.0), tx)),
    "magnitude": lambda tx: sj.graft(sj.from_gradients(tx), sj.on_updates(optax.identity())),
    "direction": lambda tx: sj.graft(sj.on_updates(optax.identity()), sj.on_updates(tx)),
    "eigenbasis": lambda tx: sj.eigenbasis(sj.on_updates(tx)),
    "in_eigenbasis": sj.in_eigenbasis,
    "kl_eigenbasis": lambda tx: sj.kl_eigenbasis(sj.on_updates(tx), scaled=True),
    "roots of KL statistics": kl_factors,
}
WHOLE = {
    **{name: lambda tx, part=part: sj.blocked(part(tx)) for name, part in PLACES.items()},
    "graft of scale_by_shampoo": lambda tx: sj.scale_by_shampoo(graft=tx),
    "graft of scale_by_soap": lambda tx: sj.scale_by_soap(graft=tx),
    "direction of as_optimizer": lambda tx: sj.as_optimizer(sj.scale_by_shampoo(graft=tx), 0.1),
}


@pytest.mark.parametrize("place", WHOLE)
def test_extra_arguments_reach_every_part(place):
    tx, params = WHOLE[place](listener()), {"w": jnp.eye(3), "v": jnp.ones((2, 3))}
    state = tx.init(params)
    for value in (3.0, 7.0):  # the first step of some parts leaves what is inside them alone
        _, state = tx.update(params, state, params, value=value)
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Heard))
    assert [float(x.value) for x in nodes if isinstance(x, Heard)] == [7.0]
