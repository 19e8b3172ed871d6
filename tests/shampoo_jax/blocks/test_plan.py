"""Merging, blocking and axis naming against tables measured on the reference."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj
from shampoo_jax import Blocking, DimensionNumbers, batch_axes
from shampoo_jax.blocks.exponents import default_exponents, left_side, smaller_side
from shampoo_jax.blocks.plan import block_key, leading_axes, make_plan, merge_dimensions

TWOS = (2, 2, 2, 2, 2, 2)


def plan(shapes, dtype=jnp.float32, exponents=default_exponents, **options):
    """Plans of the leaves of a tree (or one tuple) of shapes."""
    return whole_plan(shapes, dtype, exponents, **options).leaves


def whole_plan(shapes, dtype=jnp.float32, exponents=default_exponents, **options):
    options = {"size": None, "merge": None, "canonical": False, "dimension_numbers": None} | options
    tree = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, dtype), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    return make_plan(tree, Blocking(**options), exponents)


def sizes(leaf):
    return [cell.size for cell in leaf.cells]


@pytest.mark.parametrize(
    ("shape", "merge", "size", "merged"),
    [
        ((), 1, 1024, (1,)),
        ((1, 1), 1, 1024, (1,)),
        ((1, 1), 2, 1024, (1,)),
        ((1, 6, 1), 2, 8, (6,)),
        ((1, 3, 1, 4), 3, 8, (3, 4)),
        ((), None, 1024, ()),
        ((1, 1), None, 1024, (1, 1)),
        ((5,), 2, 1024, (5,)),
        ((7, 4), 1, 1024, (28,)),
        ((7, 4), 1, 28, (28,)),
        ((7, 4), 1, 27, (7, 4)),
        ((7, 4), 2, 1024, (7, 4)),
        ((12, 20), 1, 100, (12, 20)),
        ((3, 4, 5), 1, 1024, (60,)),
        ((3, 4, 5), 1, 20, (3, 20)),
        ((3, 4, 5), 2, 1024, (3, 20)),
        ((3, 4, 5), 3, 1024, (3, 4, 5)),
        ((3, 4, 5), None, 1024, (3, 4, 5)),
        ((3, 1, 20), 2, 1024, (3, 20)),
        ((2, 3, 4, 5), 1, 20, (6, 20)),
        ((2, 3, 4, 5), 1, 8, (6, 4, 5)),
        ((2, 3, 4, 5), 2, 1024, (2, 60)),
        ((2, 3, 4, 5), 3, 1024, (2, 3, 20)),
        ((64, 3, 7, 7), 1, 1024, (64, 147)),
        ((32, 3, 64, 64), 1, 8192, (96, 4096)),
        (TWOS, 1, 8, (8, 8)),
        (TWOS, 4, 8, (2, 2, 2, 8)),
        (TWOS, 1, None, (64,)),
        ((768, 3072), 1, 1024, (768, 3072)),
        ((50257, 768), 1, 1024, (50257, 768)),
        ((3, 0, 5), 1, 1024, (3, 0, 5)),
    ],
)
def test_merging(shape, merge, size, merged):
    assert merge_dimensions(shape, merge, size) == merged
    assert plan(shape, merge=merge, size=size)[0].merged == merged


@pytest.mark.parametrize(
    ("shape", "size", "blocks"),
    [
        ((12, 20), 8, [(8, 8), (8, 8), (8, 4), (4, 8), (4, 8), (4, 4)]),
        ((5,), 2, [(2,), (2,), (1,)]),
        ((3, 4, 5), 3, [(3, 3, 3), (3, 3, 2), (3, 1, 3), (3, 1, 2)]),
        ((3, 4, 5), None, [(3, 4, 5)]),
        ((), 4, [()]),
        ((4, 0), 4, []),
        ((9, 4), 9, [(9, 4)]),
    ],
)
def test_blocks(shape, size, blocks):
    (leaf,) = plan(shape, size=size)
    assert sizes(leaf) == blocks
    assert [cell.key for cell in leaf.cells] == [block_key(size) for size in blocks]


def test_blocks_of_an_embedding():
    (leaf,) = plan((50257, 768), size=1024, canonical=True)
    assert len(leaf.cells) == 50
    assert sizes(leaf)[-1] == (81, 768)
    keys = [cell.key for cell in leaf.cells]
    assert keys == ["1024x768"] * 49 + ["768x81"]
    assert [cell.transposed for cell in leaf.cells] == [False] * 49 + [True]


@pytest.mark.parametrize(
    ("shape", "whole", "uncut"),
    [
        ((3072, 768), {"1024x768": 3}, {"3072x768": 1}),
        ((768, 3072), {"1024x768": 3}, {"3072x768": 1}),
        ((768, 768), {"768x768": 1}, {"768x768": 1}),
        ((50304, 768), {"1024x768": 49, "768x128": 1}, {"50304x768": 1}),
        ((2048, 4096), {"1024x1024": 8}, {"4096x1024": 2}),
        (
            (2500, 2500),
            {"1024x1024": 4, "1024x452": 4, "452x452": 1},
            {"2500x1024": 2, "2500x452": 1},
        ),
    ],
)
def test_no_block_is_padded_and_a_side_without_factor_is_not_cut(shape, whole, uncut):
    one = lambda shape: smaller_side(shape)  # noqa: E731
    for exponents, cut_all, blocks in (
        (default_exponents, True, whole),
        (default_exponents, False, whole),
        (smaller_side, True, uncut),
        (one, True, whole),
        (one, False, uncut),
    ):
        (leaf,) = plan(shape, size=1024, canonical=True, exponents=exponents, cut_all=cut_all)
        assert collections.Counter(cell.key for cell in leaf.cells) == blocks
        assert sum(math.prod(cell.size) for cell in leaf.cells) == math.prod(shape)


def test_boxes_tile_the_parameter():
    (leaf,) = plan((11, 7, 4), size=3)
    covered = np.zeros((11, 7, 4), int)
    for cell in leaf.cells:
        covered[tuple(slice(s, s + n) for s, n in zip(cell.start, cell.size, strict=True))] += 1
    assert (covered == 1).all()


def test_canonical_orientation_gives_a_matrix_and_its_transpose_one_stack():
    tree = {"tall": (6, 4), "wide": (4, 6), "cube": (2, 3, 4), "vector": (4,)}
    canonical = plan(tree, canonical=True)
    assert [leaf.cells[0].key for leaf in canonical] == ["2x3x4", "6x4", "4", "6x4"]
    as_is = plan(tree)
    assert [leaf.cells[0].key for leaf in as_is] == ["2x3x4", "6x4", "4", "4x6"]


@pytest.mark.parametrize(
    ("shape", "dimensions", "batch", "slices", "merged"),
    [
        ((8, 2, 3), ((0,), (1, 2)), (), 1, (8, 6)),  # attention in: d x (heads, head_dim)
        ((2, 3, 8), ((0, 1), (2,)), (), 1, (6, 8)),  # attention out
        ((3, 3, 4, 5), ((3,), (0, 1, 2)), (), 1, (5, 36)),  # convolution: out x rest
        ((12, 8, 6), ((1,), (2,)), (0,), 12, (8, 6)),  # scanned layers
        ((2, 8, 3, 6), ((1,), (3,)), (0, 2), 6, (8, 6)),  # two batch axes, one in the middle
        ((7, 4), (), (0, 1), 28, ()),  # every entry alone
        ((0, 8, 6), ((1,), (2,)), (0,), 0, (8, 6)),  # no experts
    ],
)
def test_dimension_numbers(shape, dimensions, batch, slices, merged):
    numbers = DimensionNumbers(dimensions, batch)
    # They are final: nothing is merged after them.
    (leaf,) = plan(shape, dimension_numbers=lambda path, x: numbers, merge=1, size=1024)
    assert (leaf.batch, leaf.merged) == (slices, merged)
    assert leaf.permutation == (*batch, *(a for group in dimensions for a in group))
    assert sizes(leaf) == ([merged] if slices else [])


def test_dimension_numbers_see_path_and_leaf_and_may_decline():
    seen = []

    def rule(path, leaf):
        seen.append((jax.tree_util.keystr(path), leaf.shape))
        return DimensionNumbers(((0, 1), (2,))) if leaf.ndim == 3 else None

    tree = {"a": [(2, 3, 4), (3, 4)], "b": (1, 5)}
    leaves = plan(tree, dimension_numbers=rule, merge=1, size=12)
    assert seen == [("['a'][0]", (2, 3, 4)), ("['a'][1]", (3, 4)), ("['b']", (1, 5))]
    assert [leaf.merged for leaf in leaves] == [(6, 4), (12,), (5,)]


@pytest.mark.parametrize(
    "numbers",
    [
        DimensionNumbers(((0,), (1,))),  # an axis left out
        DimensionNumbers(((0,), (1, 2)), (0,)),  # an axis named twice
        DimensionNumbers(((0,), (1, 3))),  # no such axis
    ],
)
def test_dimension_numbers_that_do_not_fit_are_refused(numbers):
    with pytest.raises(ValueError, match=r"\['w'\].*\(2, 3, 4\).*exactly once"):
        plan({"w": (2, 3, 4)}, dimension_numbers=lambda path, x: numbers)


def test_halves_of_complex_parameters_are_read_as_real_ones_are():
    whole = {
        "conv": {"kernel": jnp.ones((3, 3, 4, 8), jnp.complex64)},
        "real": jnp.ones((2, 2)),
        "layers": {"query": {"kernel": jnp.ones((5, 6, 2, 4), jnp.complex64)}},
    }
    blocking = Blocking(dimension_numbers=batch_axes({"layers": 0}))
    seen = []
    # What `optax.contrib.split_real_and_imaginary` hands on, whose types are not public.
    record = optax.GradientTransformation(lambda p: seen.append(p), lambda u, s, p=None: (u, s))
    optax.contrib.split_real_and_imaginary(record).init(whole)
    leaves = make_plan(seen[0], blocking, default_exponents).leaves
    merged = [(leaf.batch, leaf.merged) for leaf in leaves]
    assert merged == [(1, (36, 8))] * 2 + [(5, (6, 8))] * 2 + [(1, (2, 2))]


class Numbered(dict):
    """A mapping that jax flattens without keys, as Haiku's FlatMapping is."""


jax.tree_util.register_pytree_node(
    Numbered, lambda x: (tuple(x.values()), tuple(x)), lambda k, x: Numbered(zip(k, x, strict=True))
)


@pytest.mark.parametrize("tx", [sj.scale_by_shampoo(), sj.soap(0.1), sj.kl_soap(0.1)])
@pytest.mark.parametrize("outside", [True, False])
def test_parameters_without_names_are_refused_with_the_remedy(tx, outside):
    params = Numbered(b=jnp.ones(3), w=jnp.ones((4, 3)))
    where = "as a whole" if outside else "layer"
    with pytest.raises(ValueError, match=f"parameters {where} lie in a Numbered.*convert to dict"):
        tx.init(params if outside else {"layer": params})
    with pytest.raises(ValueError, match="convert to dict"):
        sj.explain(params, tx)


def test_complex_parameters_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"\['w'\] is complex.*split_real_and_imaginary"):
        plan({"w": (2, 2)}, dtype=jnp.complex64)


def test_plan_of_arrays_and_of_shapes_agree():
    arrays = {"a": np.ones((5, 6), np.float32), "b": (jnp.ones(3, jnp.bfloat16), jnp.ones(()))}
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, arrays))
    plans = [make_plan(tree, Blocking(4), default_exponents) for tree in (arrays, shapes)]
    assert plans[0] == plans[1]


def test_leaves_that_are_cut_alike_go_together():
    """Stacks hold blocks by group, then by leaf, cell and batch slice."""
    tree = {"a": (8, 6), "b": (4, 6), "c": (8, 6), "d": (3, 4, 6)}
    layers = DimensionNumbers(((1,), (2,)), (0,))
    rule = lambda path, leaf: layers if len(leaf.shape) == 3 else None  # noqa: E731
    whole = whole_plan(tree, size=4, dimension_numbers=rule)
    assert whole.groups == [(0, 2), (1,), (3,)]
    assert whole.shapes == {"4x4": (4, 4), "4x2": (4, 2)}
    assert whole.owners["4x4"].tolist() == [0, 0, 2, 2, 1, 3, 3, 3]
    assert whole.counts == {"4x4": 8, "4x2": 8}


def test_exponents_of_a_stack_are_those_of_the_shape_it_is_stored_in():
    tall = whole_plan((2, 6), canonical=True)
    assert tall.powers == {"6x2": (0.25, 0.25)}
    # The left side of a matrix is the right one of its transpose: neither shares a stack.
    sided = whole_plan({"a": (2, 6), "b": (6, 2)}, canonical=True, exponents=left_side)
    assert sided.powers == {"2x6": (0.5, 0.0), "6x2": (0.5, 0.0)}


@pytest.mark.parametrize(
    ("shape", "merge", "numbers", "axes"),
    [
        ((4, 3, 7), 2, None, [0, 1]),
        ((4, 3, 7), None, None, [0, 1, 2]),
        ((1, 4, 1, 6), 2, None, [1, 3]),
        ((1, 1), None, None, [None, None]),
        ((), 2, None, [None]),
        ((12, 8, 6), 2, DimensionNumbers(((1,), (2,)), (0,)), [1, 2]),
        ((8, 2, 3), 2, DimensionNumbers(((0, 1), (2,))), [0, 2]),
    ],
)
def test_the_axis_that_a_merged_dimension_is_split_along(shape, merge, numbers, axes):
    (leaf,) = plan(shape, merge=merge, dimension_numbers=lambda path, leaf: numbers)
    assert leading_axes(leaf) == axes
