"""The default reading of kernels and batch axes, on modules of Flax as they are initialized."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shampoo_jax import (
    Blocking,
    DimensionNumbers,
    explain,
    is_hidden_matrix,
    scale_by_shampoo,
    shampoo,
)
from shampoo_jax.blocks.dimension_numbers import (
    batch_axes,
    default_dimension_numbers,
    resolve_dimension_numbers,
)

INWARD, OUTWARD = ((0,), (1, 2)), ((0, 1), (2,))


def readings(params, rule=default_dimension_numbers):
    """Dimensions by path, of the parameters that the rule reads."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = {jax.tree_util.keystr(p, simple=True, separator="/"): rule(p, x) for p, x in leaves}
    return {
        name.removesuffix("/value").removeprefix("params/"): numbers.dimensions
        for name, numbers in found.items()
        if numbers
    }


def linen_params(module, *inputs):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *map(jnp.ones, inputs)))


def nnx_params(build):
    return nnx.state(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)


ATTENTION = {"query/kernel": INWARD, "key/kernel": INWARD, "value/kernel": INWARD} | {
    "out/kernel": OUTWARD
}


def test_attention_of_linen():
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
    assert readings(linen_params(module, (1, 3, 4))) == ATTENTION


def test_attention_of_nnx():
    def build(rngs):
        return nnx.MultiHeadAttention(2, in_features=4, qkv_features=6, decode=False, rngs=rngs)

    params = nnx_params(build)
    assert readings(params) == ATTENTION
    assert params["query"]["kernel"].shape == (4, 2, 3)
    assert params["out"]["kernel"].shape == (2, 3, 4)


@pytest.mark.parametrize("window", [(3,), (3, 2), (3, 2, 2)])
def test_convolutions(window):
    rank = len(window) + 2
    rows_by_columns = (tuple(range(rank - 1)), (rank - 1,))

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.ConvTranspose(5, window)(nn.Conv(4, window)(x))

    linen = linen_params(Stack(), (1, *[4] * len(window), 3))
    assert linen["params"]["Conv_0"]["kernel"].shape == (*window, 3, 4)
    expected = {"Conv_0/kernel": rows_by_columns, "ConvTranspose_0/kernel": rows_by_columns}
    assert readings(linen) == expected

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.convs = nnx.List([nnx.Conv(3, 4, window, rngs=rngs)])

    assert readings(nnx_params(Model)) == {"convs/0/kernel": rows_by_columns}


def test_nothing_else_is_read():
    class Others(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="query")(x)  # a matrix already
            x = nn.DenseGeneral((2, 3))(x)  # rank 3, but who knows its rows
            x = nn.Dense(3)(nn.LayerNorm()(x))
            return nn.ConvLocal(4, (2,))(x)  # no sharing of weights

    assert readings(linen_params(Others(), (1, 5, 4))) == {}
    # Recorded trajectories have parameters of such names.
    assert readings({"ten3": jnp.ones((2, 3, 4)), "ten4": jnp.ones((2, 3, 4, 5))}) == {}
    assert readings({"conv": jnp.ones((2, 3, 4)), "query": jnp.ones((2, 3, 4))}) == {}


def test_flat_names_are_split_at_slashes():
    flat = {"decoder/attn/query/kernel": jnp.ones((4, 2, 3))}
    assert readings(flat) == {"decoder/attn/query/kernel": INWARD}


def test_attention_of_keras():
    shapes = {"query": (4, 2, 3), "attention_output": (2, 3, 4)}  # as its Variable.path has them
    params = {f"attention/{name}/kernel": jnp.ones(shape) for name, shape in shapes.items()}
    assert list(readings(params).values()) == [OUTWARD, INWARD]  # in the order of names


def test_biases_of_heads_are_no_matrices():
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
    params = linen_params(module, (1, 3, 4))
    taken = jax.tree_util.tree_map_with_path(is_hidden_matrix, params)["params"]
    assert params["params"]["query"]["bias"].shape == (2, 3)
    assert taken["query"] == {"bias": False, "kernel": True}


def test_explain_prints_each_choice():
    params = linen_params(nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6), (1, 3, 4))
    conv = linen_params(nn.Conv(5, (3, 3)), (1, 4, 4, 2))
    params = {"attn": params["params"], "conv": conv["params"]}
    lines = {line.split()[0]: line.split() for line in str(explain(params)).splitlines()[:11]}
    assert lines["attn/query/kernel"][2:5] == ["4x2x3", "preconditioned", "4x6"]
    assert lines["attn/out/kernel"][2:5] == ["2x3x4", "preconditioned", "6x4"]
    assert lines["conv/kernel"][2:5] == ["3x3x2x5", "preconditioned", "18x5"]
    off = explain(params, shampoo(0.1, blocking=Blocking(dimension_numbers=None)))
    assert {r.name: r.merged for r in off.rows}["attn/query/kernel"] == (4, 6)
    assert {r.name: r.merged for r in off.rows}["attn/out/kernel"] == (2, 12)


def test_default_of_the_transformation_is_the_rule():
    params = {"out": {"kernel": jnp.ones((2, 3, 4))}}
    factors = {}
    for option in ("flax", None):
        tx = scale_by_shampoo(blocking=Blocking(dimension_numbers=option))
        factors[option] = jax.eval_shape(tx.init, params).inner_state.leaves
    assert list(factors["flax"]) == ["6x4"]
    assert list(factors[None]) == ["12x2"]
    default = jax.eval_shape(scale_by_shampoo().init, params)
    assert list(default.inner_state.leaves) == ["6x4"]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'haiku' is unknown: choose from .'flax', None"):
        Blocking(dimension_numbers="haiku")
    rule = lambda path, leaf: None  # noqa: E731
    assert resolve_dimension_numbers(rule) is rule


LAYERS = Blocking(dimension_numbers=batch_axes({"layers": 0}))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, name="attn")(x)
        return nn.Dense(4, name="dense")(x), None


def scanned_params(length):
    stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=length)
    return linen_params(stack(name="layers"), (1, 3, 4), (length,))["params"]


def test_scanned_layers():
    params = {"layers": scanned_params(3)}
    assert params["layers"]["dense"]["kernel"].shape == (3, 4, 4)
    found = readings(params, batch_axes({"layers": 0}))
    assert found == {
        "layers/attn/query/kernel": ((1,), (2, 3)),
        "layers/attn/key/kernel": ((1,), (2, 3)),
        "layers/attn/value/kernel": ((1,), (2, 3)),
        "layers/attn/out/kernel": ((1, 2), (3,)),
        "layers/dense/kernel": ((1,), (2,)),
        "layers/attn/query/bias": ((1,), (2,)),
        "layers/attn/key/bias": ((1,), (2,)),
        "layers/attn/value/bias": ((1,), (2,)),
        "layers/attn/out/bias": ((1,),),
        "layers/dense/bias": ((1,),),
    }
    report = explain(params, shampoo(0.1, blocking=LAYERS))
    assert {r.name: (r.batch, r.merged) for r in report.rows if r.preconditioned} == {
        "layers/attn/query/kernel": (3, (4, 6)),
        "layers/attn/key/kernel": (3, (4, 6)),
        "layers/attn/value/kernel": (3, (4, 6)),
        "layers/attn/out/kernel": (3, (6, 4)),
        "layers/dense/kernel": (3, (4, 4)),
    }


def test_slices_of_a_batch_train_like_parameters_of_their_own():
    rng = np.random.default_rng(0)
    gradients = [jnp.asarray(rng.normal(size=(3, 4, 2, 3)), jnp.float32) for _ in range(3)]

    def updates(trees, **options):
        tx = scale_by_shampoo(0.9, 0.9, **options)
        state, update = tx.init(trees[0]), jax.jit(tx.update)
        for tree in trees:
            new, state = update(tree, state, tree)
        return new

    stacked = updates(
        [{"layers": {"query": {"kernel": g}}} for g in gradients],
        blocking=LAYERS,
    )
    alone = updates([{str(i): g[i].reshape(4, 6) for i in range(3)} for g in gradients])
    for i in range(3):
        got, expected = stacked["layers"]["query"]["kernel"][i].reshape(4, 6), alone[str(i)]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * jnp.abs(expected).max())


def test_batch_axes_of_several_components_add_up():
    rule = batch_axes({"layers": 0, "experts": (-3,)}, rule=None)
    path = tuple(map(jax.tree_util.DictKey, ("layers", "experts", "w")))
    leaf = jax.ShapeDtypeStruct((3, 5, 4, 2), jnp.float32)
    assert rule(path, leaf) == DimensionNumbers(((2,), (3,)), (0, 1))
    assert rule(path[1:], leaf) == DimensionNumbers(((0,), (2,), (3,)), (1,))
    assert rule(path[2:], leaf) is None


def test_the_batch_of_the_inner_rule_is_kept():
    heads = lambda path, leaf: DimensionNumbers(((0,), (2,)), (1,))  # noqa: E731
    rule = batch_axes({"layers": 0}, rule=heads)
    leaf = jax.ShapeDtypeStruct((3, 5, 4, 2), jnp.float32)
    assert rule((jax.tree_util.DictKey("layers"),), leaf) == DimensionNumbers(((1,), (3,)), (0, 2))


def test_a_parameter_without_the_axis_is_named():
    params = {"layers": {"w": jnp.ones((3, 4, 4)), "step": jnp.ones(())}}
    with pytest.raises(ValueError, match=r"axes \(0,\) of parameter \['layers'\]\['step'\].*\(\)"):
        scale_by_shampoo(blocking=LAYERS).init(params)
