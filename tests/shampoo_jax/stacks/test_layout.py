"""What a layout knows of stacks: their length, the number of each block, and who holds what."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import shampoo_jax as sj
from shampoo_jax.blocks.exponents import default_exponents
from shampoo_jax.blocks.plan import make_plan
from shampoo_jax.stacks.layout import Layout, OneDevice

# Blocks of 8: five of 8x8, one of 8x4 from "a", two vectors of 8.
TREE = {
    "a": jax.ShapeDtypeStruct((8, 20), jnp.float32),
    "b": jax.ShapeDtypeStruct((24, 8), jnp.float32),
    "c": jax.ShapeDtypeStruct((16,), jnp.float32),
}
COUNTS = {"8x8": 5, "8x4": 1, "8": 2}
MESH = AbstractMesh((2, 2), ("data", "model"))


def layout_on(devices):
    return Layout(devices, TREE, make_plan(TREE, sj.Blocking(8), default_exponents))


DEVICES = {
    "one device": OneDevice(),
    "two owners": sj.Placement(MESH, "data"),
    "four owners": sj.Placement(MESH, ("data", "model")),
    "four owners, eight": sj.Placement(MESH, ("data", "model"), stack_multiple=8),
}
MULTIPLES = [*zip(DEVICES.values(), (1, 2, 4, 8), strict=True)]


@pytest.mark.parametrize(("devices", "multiple"), MULTIPLES, ids=DEVICES)
def test_stacks_are_filled_to_the_multiple(devices, multiple):
    layout = layout_on(devices)
    assert layout.plan.counts == COUNTS
    assert layout.lengths == {k: -(-n // multiple) * multiple for k, n in COUNTS.items()}


@pytest.mark.parametrize("devices", DEVICES.values(), ids=DEVICES)
def test_a_block_has_the_same_number_on_every_number_of_devices(devices):
    """A staggered refresh goes by it, so that a state can be continued anywhere."""
    layout, begin = layout_on(devices), 0
    for key, index in layout.index.items():
        assert index.dtype == np.int32
        np.testing.assert_array_equal(index, begin + np.arange(layout.lengths[key]))
        begin += COUNTS[key]


@pytest.mark.parametrize("devices", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize(
    ("values", "fill"), [(np.arange(3, dtype=np.int32), -1), (np.array([True, False, True]), True)]
)
def test_what_is_known_of_a_leaf_is_known_of_its_blocks(devices, values, fill):
    """In the dtype that it has: a state that is saved tells leaves by integers."""
    owners = {"8x8": [0, 0, 1, 1, 1], "8x4": [0], "8": [2, 2]}
    layout = layout_on(devices)
    found = layout.per_block(values, fill)
    assert found.keys() == owners.keys()
    for key, x in found.items():
        assert x.dtype == values.dtype and x.shape == (layout.lengths[key],)
        np.testing.assert_array_equal(x[: len(owners[key])], values[owners[key]])
        assert (x[len(owners[key]) :] == fill).all()


def test_a_saved_state_names_leaves_by_integers():
    params = jax.tree.map(lambda x: jnp.ones(x.shape), TREE)
    state = sj.blocked(optax.identity(), blocking=sj.Blocking(8)).init(params).inner_state
    assert {x.dtype for x in state.leaves.values()} == {jnp.dtype(jnp.int32)}
    assert {key: x.tolist() for key, x in state.leaves.items()} == {
        "8x8": [0, 0, 1, 1, 1],
        "8x4": [0],
        "8": [2, 2],
    }


def test_what_has_one_entry_a_block_lies_at_its_owner_all_else_everywhere():
    layout = layout_on(DEVICES["four owners"])
    state = {
        "count": jnp.zeros([], jnp.int32),
        "factors": {"8x8": (jnp.zeros((8, 8, 8)), jnp.zeros((8, 8, 8)))},
        "of another length": {"8x8": jnp.zeros((5, 8))},
        "of no stack": {"9x9": jnp.zeros((8, 8))},
    }
    at_owner = P(("data", "model"))
    assert layout.owner_spec("8x8") == at_owner
    assert layout.state_specs(state) == {
        "count": P(),
        "factors": {"8x8": (at_owner, at_owner)},
        "of another length": {"8x8": P()},
        "of no stack": {"9x9": P()},
    }


@pytest.mark.parametrize("placement", [None, sj.Placement(MESH, "data")])
def test_rules_are_asked_once_for_each_tree(placement):
    """Plans and layouts follow from shapes: a step outside of jit, or traced anew, makes none."""
    asked = []

    def rule(path, leaf):
        asked.append((path[0].key, leaf.shape))

    blocking = sj.Blocking(8, dimension_numbers=rule)
    tx = sj.blocked(optax.identity(), blocking=blocking, placement=placement).inner
    state = jax.eval_shape(tx.init, TREE)
    once = [(name, x.shape) for name, x in TREE.items()]
    assert asked == once
    for _ in range(3):
        jax.eval_shape(tx.update, TREE, state, TREE)
    assert asked == once
    other = {**TREE, "b": jax.ShapeDtypeStruct((8, 24), jnp.float32)}
    jax.eval_shape(tx.init, other)
    assert len(asked) == 2 * len(once)
