"""Leaves that are cut alike go to the owners of their blocks together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import shampoo_jax as sj
from shampoo_jax.blocks.plan import make_plan
from shampoo_jax.stacks.layout import StackLayout
from shampoo_jax.stacks.placement import Placement
from shampoo_jax.stacks.split import buckets_of, join, split


def make_leaves(layers):
    """Members of a bucket are not neighbours in their stacks."""
    rng = np.random.default_rng(0)
    return {
        f"layer{i}": {
            "in": jnp.asarray(rng.integers(-9, 9, (16, 24)), jnp.float32),
            "half": jnp.asarray(rng.integers(-9, 9, (16, 24)), jnp.bfloat16),
            "out": jnp.asarray(rng.integers(-9, 9, (24, 16)), jnp.float32),
            "rest": jnp.asarray(rng.integers(-9, 9, (16, 20)), jnp.float32),
        }
        for i in range(layers)
    }


def rows(path, leaf):
    return P("data")


def layout_of(tree, axis_types=None):
    mesh = jax.make_mesh((8,), ("data",), axis_types=axis_types)
    plan = make_plan(tree, block_size=8, merge=2, canonical=True)
    return plan, StackLayout(Placement(mesh, "data", rows), tree, plan)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_bucketed_leaves_make_the_same_stacks(kind):
    tree = make_leaves(3)
    plan, layout = layout_of(tree, (kind,))
    leaves = jax.tree.leaves(tree)
    dtypes = [x.dtype for x in leaves]
    assert {len(b.members) for b in buckets_of(plan, dtypes, layout)} == {3}

    def there_and_back(leaves):
        stacks = split(leaves, plan, layout)
        return stacks, join(stacks, plan, dtypes, layout)

    with jax.set_mesh(layout.placement.mesh):
        stacks, joined = jax.jit(there_and_back)(leaves)
    for key, expected in split(leaves, plan).items():
        slots = layout.slots.order[key]
        np.testing.assert_array_equal(np.asarray(stacks[key])[slots >= 0], expected)
        assert not np.asarray(stacks[key])[slots < 0].any()
    for new, old in zip(joined, leaves, strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(np.asarray(new, np.float32), np.asarray(old, np.float32))


def test_more_layers_are_not_more_exchanges():
    def exchanges(layers):
        tree = make_leaves(layers)
        report = sj.explain(tree, block_size=8, mesh={"data": 8}, parameter_spec=rows)
        return report.on_mesh.exchanges

    few, many = exchanges(1), exchanges(4)
    assert {k: n for k, (n, _) in few.items()} == {k: n for k, (n, _) in many.items()}
    assert many["all-to-all"][1] > 3 * few["all-to-all"][1]


def test_a_whole_leaf_shares_a_stack_with_a_split_one_on_explicit_axes():
    def spec(path, leaf):
        return P(None, "data") if leaf.shape[1] == 8 else P()

    tree = {"split": jnp.ones((64, 8)), "whole": jnp.arange(256.0).reshape(16, 16)}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    plan = make_plan(tree, block_size=8, merge=2, canonical=False)
    layout = StackLayout(Placement(mesh, "data", spec), tree, plan)
    leaves = jax.tree.leaves(tree)
    with jax.set_mesh(mesh):
        back = jax.jit(lambda x: join(split(x, plan, layout), plan, [jnp.float32] * 2, layout))
        for new, old in zip(back(leaves), leaves, strict=True):
            np.testing.assert_array_equal(new, old)
