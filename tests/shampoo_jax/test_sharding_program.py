"""What the compiler makes of a step on a mesh: which exchanges, how wide, in how much memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import shampoo_jax as sj
from scripts.maintenance import sharding_equality as se
from scripts.maintenance import sharding_table as st
from shampoo_jax.inspect.programs import KINDS

# Sixteen blocks whose factors, 24x24 and 16x16, are not shaped like them; apart, or in one leaf.
SHAPES = {f"w{i}": (24, 16) if i % 2 else (16, 24) for i in range(16)}
STACKED = {"w": (16, 24, 16)}
SIZE = 16 * 24 * 16 * 4


def lowered(layout, make, shapes, **options):
    axes, owners, spec = se.LAYOUTS[layout]
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes))
    tx = make(sj.Placement(mesh, owners, spec, **options))
    params = {
        k: jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec((), np.ones(s))))
        for k, s in shapes.items()
    }
    return jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params))


def whole(placement):
    rule = sj.batch_axes({"w": 0})
    blocking = sj.Blocking(dimension_numbers=rule)
    return sj.scale_by_shampoo(blocking=blocking, placement=placement)


def only_moves(placement, blocking=None):
    """What `guard` adds, checks that are reduced over all devices, is left out."""
    return sj.blocked(optax.identity(), blocking=blocking, placement=placement).inner


def planned(shapes, placement, blocking=None):
    shapes = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    tx = sj.scale_by_shampoo(blocking=blocking, placement=placement)
    return sj.explain(shapes, tx).on_mesh.exchanges


@pytest.mark.parametrize("layout", ["replicated", "rows", "rows and columns"])
def test_factors_stay_and_nothing_is_replicated(layout, capfd):
    text = lowered(layout, whole, STACKED).compile().as_text()
    lines = [x for x in text.splitlines() if re.search(rf" = .*? ({KINDS})(-start)?\(", x)]
    assert lines and not [x for x in lines if re.search(r"\[[\d,]*(24,24|16,16)\]", x)]
    # Blocks are decomposed one at a time, the owner's two alone.
    loops = [x for x in text.splitlines() if " while(" in x and "known_trip_count" in x]
    assert {re.search(r'known_trip_count":{"n":"(\d+)"', x)[1] for x in loops} == {"2"}
    assert "rematerialization" not in capfd.readouterr().err


def test_an_unplanned_change_of_layout_is_reported(capfd):
    """That the test above would see one: pieces split otherwise than their stack."""
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    x = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=NamedSharding(mesh, P("x", "y")))
    out = NamedSharding(mesh, P(("x", "y")))
    jax.jit(lambda x: jnp.stack([x] * 8), out_shardings=out).lower(x).compile()
    assert "Involuntary full rematerialization" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("layout", "copies"),
    [
        ("replicated", 1.3),
        ("a group of owners", 1.3),
        ("rows", 0.6),
        ("rows and columns", 0.6),
        ("columns", 1.3),
        ("replicas of rows", 1.3),
    ],
)
def test_the_way_takes_the_planned_exchanges_and_a_copy_of_the_update(layout, copies, capfd):
    step = lowered(layout, only_moves, SHAPES).compile()
    axes, owners, spec = se.LAYOUTS[layout]
    expected = planned(
        SHAPES, sj.Placement(AbstractMesh(tuple(axes.values()), tuple(axes)), owners, spec)
    )
    found = st.exchanges(step.as_text())
    permuted = found.pop("collective-permute", (0, 0))[1]
    assert permuted <= (SIZE / 8 if layout == "rows and columns" else 0)
    assert found.keys() == expected.keys()
    for kind, (_, size) in expected.items():
        assert found[kind][1] == size or (kind == "all-to-all" and found[kind][1] < 1.3 * size)
    assert step.memory_analysis().temp_size_in_bytes < copies * SIZE
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize("layout", ["replicated", "rows", "rows and columns"])
def test_bfloat16_travels_as_bfloat16(layout, tmp_path):
    # Tall and wide ones change their layout on the way to a common stack.
    shapes = {k: ((24, 16), (16, 24))[i % 2] for i, k in enumerate(SHAPES)}
    narrow = lowered(layout, only_moves, shapes, communication_dtype=jnp.bfloat16)
    # XLA:CPU widens collectives again later, so the partitioner's own result is read.
    dump = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    narrow.compile(compiler_options=dump)
    (path,) = tmp_path.glob("*after_spmd-partitioning*.txt")
    moved = re.findall(rf"= (\w+)\[.*? (?:{KINDS})\(", path.read_text())
    assert moved and set(moved) == {"bf16"}


def test_cuts_across_a_split_dimension_are_made_where_it_is_whole():
    def small_blocks(placement):
        return only_moves(placement, sj.Blocking(8))

    text = lowered("rows", small_blocks, {"w": (32, 16)}).compile().as_text()
    assert set(st.exchanges(text)) == {"all-to-all"}  # no permutation of single rows


def test_rows_split_over_two_axes_move_the_minor_one_first():
    mesh = jax.make_mesh((2, 4), ("replica", "fsdp"))
    spec = P(("replica", "fsdp"))
    tx = only_moves(sj.Placement(mesh, ("replica", "fsdp"), lambda path, leaf: spec))
    split = NamedSharding(mesh, spec)
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32, sharding=split) for k, s in SHAPES.items()}
    step = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params))
    assert set(st.exchanges(step.compile().as_text())) == {"all-to-all"}  # no permutation


def test_experts_split_on_three_axes_are_cut_without_replication(capfd):
    mesh = jax.make_mesh((2, 2, 2), ("expert", "fsdp", "tensor"))
    spec = P("expert", "fsdp", "tensor")
    placement = sj.Placement(mesh, ("expert", "fsdp", "tensor"), lambda path, leaf: spec)
    blocking = sj.Blocking(8, dimension_numbers=sj.batch_axes({"w": 0}))
    tx = only_moves(placement, blocking)
    shape = jax.ShapeDtypeStruct((4, 16, 16), jnp.float32, sharding=NamedSharding(mesh, spec))
    split = {"w": shape}
    step = jax.jit(tx.update).lower(split, jax.eval_shape(tx.init, split)).compile()
    assert "rematerialization" not in capfd.readouterr().err
    assert st.exchanges(step.as_text()) == planned({"w": shape.shape}, placement, blocking)


def test_the_check_of_gradients_exchanges_truth_values_alone():
    def moves(placement):
        return sj.blocked(optax.identity(), placement=placement)

    bare = st.exchanges(lowered("rows", only_moves, SHAPES).compile().as_text())
    found = st.exchanges(lowered("rows", moves, SHAPES).compile().as_text())
    reduced = found.pop("all-reduce")
    assert found == bare
    assert reduced[1] <= 4 * len(SHAPES)
