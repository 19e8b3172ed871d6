"""Leaves that are cut alike are cut, and go to the owners of their blocks, together."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shampoo_jax as sj
from shampoo_jax.blocks.exponents import default_exponents
from shampoo_jax.blocks.plan import make_plan
from shampoo_jax.stacks.layout import Layout, OneDevice
from shampoo_jax.stacks.placement import Placement
from shampoo_jax.stacks.split import join, split


def make_leaves(layers):
    """Members of a bucket are not neighbours in the tree."""
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


def layout_of(tree, spec=None, axis_types=None, blocking=None):
    """On one device without a spec."""
    plan = make_plan(tree, blocking or sj.Blocking(8), default_exponents)
    if spec is None:
        return Layout(OneDevice(), tree, plan)
    mesh = jax.make_mesh((8,), ("data",), axis_types=axis_types)
    return Layout(Placement(mesh, "data", spec), tree, plan)


def assert_equal(new, old):
    for x, y in zip(new, old, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_bucketed_leaves_make_the_same_stacks(kind):
    tree = make_leaves(3)
    layout = layout_of(tree, rows, (kind,))
    leaves = jax.tree.leaves(tree)
    dtypes = [x.dtype for x in leaves]
    assert {len(b.members) for b in layout.buckets} == {3}

    def there_and_back(leaves):
        stacks = split(leaves, layout)
        return stacks, join(stacks, layout, dtypes)

    with jax.set_mesh(layout.devices.mesh):
        stacks, joined = jax.jit(there_and_back)(leaves)
    for key, expected in split(leaves, layout_of(tree)).items():
        whole = np.asarray(stacks[key])
        np.testing.assert_array_equal(whole[: len(expected)], expected)
        assert len(whole) % 8 == 0 and not whole[len(expected) :].any()
    assert_equal(joined, leaves)


def test_stacks_hold_groups_then_leaves_then_cells_then_batch():
    """The order that a saved state relies on, by value: every entry is its own number."""
    numbers = sj.batch_axes({"experts": 0})
    shapes = {"a": (3, 2), "experts": (2, 2, 3), "b": (2, 4), "c": (3, 2), "d": (2, 4)}
    sizes = [int(np.prod(s)) for s in shapes.values()]
    begins = dict(zip(shapes, np.cumsum([0, *sizes]), strict=False))
    tree = {k: begins[k] + jnp.arange(np.prod(s)).reshape(s) for k, s in shapes.items()}
    blocking = sj.Blocking(2, canonical=False, dimension_numbers=numbers)
    layout = layout_of(tree, blocking=blocking)
    stacks = split(jax.tree.leaves(tree), layout)
    slabs = {k: np.asarray(x).reshape(-1, *x.shape[-2:]) for k, x in tree.items()}

    def blocks(height, width):
        found = []
        for group in (("a", "c"), ("b", "d"), ("experts",)):
            for name in group:
                rows, columns = slabs[name].shape[1:]
                for i in range(0, rows, 2):
                    for j in range(0, columns, 2):
                        found += list(slabs[name][:, i : i + 2, j : j + 2])
        return [x for x in found if x.shape == (height, width)]

    assert stacks.keys() == {"2x2", "1x2", "2x1"}
    for key, x in stacks.items():
        expected = blocks(*map(int, key.split("x")))
        np.testing.assert_array_equal(x, expected)
        assert len(layout.plan.owners[key]) == len(expected)


@pytest.mark.parametrize("spec", [None, rows])
def test_blocks_come_in_the_plans_order_where_leaves_of_a_group_lie_apart(spec):
    """Narrow leaves are exchanged by themselves, yet stacks hold a group as the plan has it."""
    dtypes = (jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.float32)
    tree = [jnp.full((16, 24), i, d) for i, d in enumerate(dtypes)]
    layout = layout_of(tree, spec, (jax.sharding.AxisType.Auto,))
    stacks = jax.jit(lambda x: split(x, layout))(tree)
    (x,) = stacks.values()
    np.testing.assert_array_equal(x[:, 0, 0], np.repeat(np.arange(4), 6))
    assert_equal(jax.jit(lambda x: join(x, layout, dtypes))(stacks), tree)


def test_leaves_of_other_numbers_of_dimensions_share_a_stack():
    shapes = [(), (1,), (1, 1), (0,), (0, 3), (2, 3), (1, 2, 3), (2, 1, 3)]
    tree = [jnp.asarray(np.random.default_rng(0).normal(size=s), jnp.float32) for s in shapes]
    for merge in (None, 2):
        layout = layout_of(tree, blocking=sj.Blocking(2, merge=merge))
        stacks = split(tree, layout)
        assert_equal(join(stacks, layout, [x.dtype for x in tree]), tree)


def operations(layers):
    """How often each operation occurs in the program of an update on one device, before XLA."""
    tx = sj.scale_by_shampoo(blocking=sj.Blocking(8))
    tree = jax.eval_shape(lambda: make_leaves(layers))
    text = jax.jit(tx.inner.update).lower(tree, jax.eval_shape(tx.inner.init, tree)).as_text()
    return collections.Counter(x.split(" ")[0] for x in text.split("stablehlo.")[1:])


def test_more_layers_are_not_more_concatenations_and_slices():
    """What compiling costs: more leaves are more reshapes into a bundle and out of it, no more."""
    few, many = operations(2), operations(8)
    added = many - few
    # Each leaf is a slice out of its bundle; a bundle is one concatenation of however many leaves.
    assert added["concatenate"] == 0
    assert added["slice"] == 6 * 4
    assert {"custom_call", "dot_general", "while", "pad"}.isdisjoint(added)


def test_more_layers_are_not_more_exchanges():
    def exchanges(layers):
        tx = sj.scale_by_shampoo(blocking=sj.Blocking(8))
        report = sj.explain(make_leaves(layers), tx, mesh={"data": 8}, parameter_spec=rows)
        return report.on_mesh.exchanges

    few, many = exchanges(1), exchanges(4)
    assert {k: n for k, (n, _) in few.items()} == {k: n for k, (n, _) in many.items()}
    assert many["all-to-all"][1] > 3 * few["all-to-all"][1]


def test_a_whole_leaf_shares_a_stack_with_a_split_one_on_explicit_axes():
    def spec(path, leaf):
        return P(None, "data") if leaf.shape[1] == 8 else P()

    tree = {"split": jnp.ones((64, 8)), "whole": jnp.arange(256.0).reshape(16, 16)}
    kinds = (jax.sharding.AxisType.Explicit,)
    layout = layout_of(tree, spec, kinds, sj.Blocking(8, canonical=False))
    leaves = jax.tree.leaves(tree)
    with jax.set_mesh(layout.devices.mesh):
        back = jax.jit(lambda x: join(split(x, layout), layout, [jnp.float32] * 2))
        assert_equal(back(leaves), leaves)


class TestParametersAreCutWhenRead:
    """Most parts read gradients alone: cutting parameters would be exchanges for nothing."""

    def seen(self, read):
        found = []

        def update(stacks, state, params):
            found.append(read(params))
            return stacks, state

        part = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
        tx = sj.blocked(part, blocking=sj.Blocking(4)).inner
        params = {"w": jnp.arange(32.0).reshape(8, 4)}
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(params, state, params)
        assert_equal(jax.tree.leaves(updates), jax.tree.leaves(params))
        return tx, found

    def test_a_part_that_asks_gets_blocks(self):
        _, found = self.seen(lambda params: params["4x4"].update.sum())
        assert found == [31 * 16] * 2

    @pytest.mark.parametrize(
        "read",
        [
            lambda params: list(params),
            lambda params: params.items(),
            lambda params: params.get("4x4"),
            lambda params: jax.tree.map(jnp.sum, params["4x4"]),
        ],
    )
    def test_every_way_of_asking(self, read):
        assert len(self.seen(read)[1]) == 2

    def test_whether_there_are_parameters_is_known_without(self):
        tx, found = self.seen(lambda params: params is None)
        assert found == [False] * 2
        params = {"w": jnp.ones((8, 4))}
        tx.update(params, tx.init(params))
        assert found[-1]

    def test_without_a_reader_parameters_are_in_no_program(self):
        tx = sj.scale_by_shampoo(blocking=sj.Blocking(4)).inner
        params = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
        state = jax.eval_shape(tx.init, params)
        program = jax.make_jaxpr(tx.update)(params, state, params)
        weights = program.jaxpr.invars[-1]
        assert not any(weights is v for eqn in program.eqns for v in eqn.invars)


def test_leaves_that_merge_alike_are_exchanged_together_however_they_lie():
    """A row and a column of one length: their merged layouts are equal, their own are not."""
    tree = {"row": jnp.arange(16.0).reshape(1, 16), "column": jnp.arange(16.0).reshape(16, 1)}

    def spec(path, leaf):
        return P(None, "data") if len(leaf) == 1 else P("data")

    kinds, blocking = (jax.sharding.AxisType.Auto,), sj.Blocking(8, merge=1)
    layout = layout_of(tree, spec, kinds, blocking)
    assert [len(b.members) for b in layout.buckets] == [2]
    leaves = jax.tree.leaves(tree)
    back = jax.jit(lambda x: join(split(x, layout), layout, [jnp.float32] * 2))
    assert_equal(back(leaves), leaves)
