"""Which parameters are matrices, by the names of several libraries."""

import functools
from typing import Any

import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import optax
import pytest

import shampoo_jax as sj
from shampoo_jax.optimizers.routing import labels_by

VECTORS = [
    # Stacked by vmap, scan or a layer stack: two axes, but vectors.
    "layers/norm1/weight",  # Equinox
    "layers/post_attention_layernorm/weight",
    "h/ln_1/weight",
    "layers/q_norm/weight",
    "layer_stack/linear/b",  # Haiku
    "layer_stack/layer_norm/offset",
    "attn/q_norm",
    "ln_f",
    "block/ln_1",
    "attn/bq",
    "rms_attn/g",
    "block/layer_normalization/gamma",  # Keras
    "layers/LayerNorm_0/scale",  # Flax
    "layers/attn/in_proj_bias",
    "layers/attn/bias_q",
    "layers/dense/biases",
    "layers/norm_weight",
    "layers/layer_scale",
    "layers/RMSNorm/w",
    "layers/attn_norm/g",
    "layers/rms/weight",
]


@pytest.mark.parametrize("path", VECTORS)
def test_stacked_vectors_are_no_matrices(path):
    assert not is_hidden(path, (32, 4096))


@pytest.mark.parametrize(
    "path",
    [
        *("normed_linear/weight", "lnear/weight", "block/weight", "b", "q/lora/b"),
        *("layernorm_mlp/weight", "attn_norm_proj/w", "rescaled/kernel", "unbiased", "g", "w"),
    ],
)
def test_weights_of_other_modules_are_matrices(path):
    assert is_hidden(path, (32, 4096))


def test_batch_axes_are_no_dimensions_of_a_matrix():
    params = {"layers": {"g": jnp.ones((4, 8)), "w": jnp.ones((4, 8, 8))}, "w": jnp.ones((4, 8))}
    blocking = sj.Blocking(dimension_numbers=sj.batch_axes({"layers": 0}))
    report = sj.explain(params, sj.shampoo(0.1, blocking=blocking))
    taken = {row.name: row.preconditioned for row in report.rows}
    assert taken == {"layers/g": False, "layers/w": True, "w": True}
    # A rule of one's own sees the whole parameter.
    rule = lambda path, leaf: leaf.ndim > 1  # noqa: E731
    report = sj.explain(params, sj.shampoo(0.1, blocking=blocking, preconditioned=rule))
    assert all(row.preconditioned for row in report.rows)


def is_hidden(path, shape):
    """The default rule for a parameter under nested dictionary keys, `"a/b"` being two."""
    keys = tuple(jax.tree_util.DictKey(k) for k in path.split("/"))
    return sj.is_hidden_matrix(keys, jax.ShapeDtypeStruct(shape, jnp.float32))


HIDDEN = [
    # Flax Linen
    "params/encoder/layers_0/SelfAttention_0/query/kernel",
    "params/MultiHeadDotProductAttention_0/out/kernel",
    "params/Dense_0/kernel",
    "params/Conv_3/kernel",
    # Flax NNX
    "blocks/0/attn/q/kernel",
    "layers/3/mlp/fc1/kernel",
    # Haiku
    "transformer/~/multi_head_attention/query/w",
    "mlp/~/linear_0/w",
    # Equinox, PyTorch conversions
    "layers/0/attention/query_proj/weight",
    "model/layers/7/self_attn/o_proj/weight",
    "h/0/attn/c_attn/weight",
    "h/0/attn_head/0/weight",
    # words that merely contain a table's
    "ahead/kernel",
    "overhead_proj/kernel",
    "heads/0/kernel",
    "ember/kernel",
    "september/kernel",
    "wten/kernel",
]
TABLES = [
    "params/Embed_0/embedding",
    "params/shared_embedding/embedding",
    "params/pos_embed",
    "params/LMHead_0/kernel",
    "params/lm_head/kernel",
    "params/logits_dense/kernel",
    "embed/embedding",
    "head/kernel",
    "tok_emb/weight",
    "emb/weight",
    "classifier_head/kernel",
    "policy_head_1/kernel",
    "gpt/~/embed/w",
    "transformer/wte/weight",
    "transformer/wpe/weight",
    "unembed/W_U",
    "output_vocab/kernel",
]


@pytest.mark.parametrize("path", HIDDEN)
def test_hidden_matrices(path):
    assert is_hidden(path, (4, 3))


@pytest.mark.parametrize("path", TABLES)
def test_tables(path):
    assert not is_hidden(path, (4, 3))


def test_haiku_keys_hold_several_components():
    keys = (jax.tree_util.DictKey("gpt/~/lm_head"), jax.tree_util.DictKey("w"))
    assert not sj.is_hidden_matrix(keys, jnp.ones((4, 3)))
    keys = (jax.tree_util.DictKey("gpt/~/multi_head_attention/query"), jax.tree_util.DictKey("w"))
    assert sj.is_hidden_matrix(keys, jnp.ones((4, 3)))


@pytest.mark.parametrize(
    ("shape", "hidden"),
    [
        ((), False),
        ((3,), False),
        ((3, 1), False),
        ((1, 1, 3), False),
        ((3, 2), True),
        ((3, 1, 2), True),
        ((3, 3, 4, 8), True),
    ],
)
def test_shapes(shape, hidden):
    assert is_hidden("dense/kernel", shape) is hidden


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 4)(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        x = nn.Dense(6)(x)
        return nn.Dense(11, name="lm_head")(x)


def test_a_flax_linen_model():
    tokens = jnp.zeros((1, 3), jnp.int32)
    params = jax.eval_shape(LinenModel().init, jax.random.key(0), tokens)["params"]
    labels = labels_by(sj.is_hidden_matrix)(params)
    paths = jax.tree_util.tree_leaves_with_path(labels)
    matrices = {
        jax.tree_util.keystr(p, simple=True, separator="/") for p, x in paths if x[0] == "m"
    }
    attention = "MultiHeadDotProductAttention_0"
    # Biases of heads are two-dimensional, and vectors nevertheless.
    assert matrices == {"Dense_0/kernel"} | {
        f"{attention}/{part}/kernel" for part in ("query", "key", "value", "out")
    }


class NNXModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.attn = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)
        self.head = nnx.Linear(4, 7, rngs=rngs)


def test_a_flax_nnx_model():
    params = nnx.eval_shape(lambda: nnx.state(NNXModel(), nnx.Param))
    labels = jax.tree_util.tree_leaves_with_path(labels_by(sj.is_hidden_matrix)(params))
    matrices = [
        jax.tree_util.keystr(p, simple=True, separator="/") for p, x in labels if x[0] == "m"
    ]
    assert {m.removesuffix("/value") for m in matrices} == {
        *("blocks/0/kernel", "blocks/1/kernel", "attn/query/kernel", "attn/key/kernel"),
        *("attn/value/kernel", "attn/out/kernel"),
    }


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lm_head", "proj"], meta_fields=[]
)
class Module:
    """Attributes as path, as in Equinox."""

    def __init__(self, lm_head: Any, proj: Any):
        self.lm_head, self.proj = lm_head, proj


@jax.tree_util.register_pytree_node_class
class Boxed:
    """An array in a node without keys, as Haliax's NamedArray is: jax numbers its child."""

    def __init__(self, array):
        self.array = array

    def tree_flatten(self):
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_a_box_without_keys_is_no_name():
    params = {"input_layernorm": {"weight": Boxed(jnp.ones((2, 64)))}}
    params["mlp"] = {"weight": Boxed(jnp.ones((2, 64)))}
    taken = jax.tree_util.tree_map_with_path(sj.is_hidden_matrix, params)
    assert jax.tree.leaves(taken) == [False, True]


def test_attributes_are_names():
    labels = labels_by(sj.is_hidden_matrix)(Module(jnp.ones((3, 2)), jnp.ones((3, 2))))
    assert (labels.lm_head, labels.proj) == ("others", "matrices")


def test_labels_of_trees_with_holes():
    params = {"a": None, "b": optax.MaskedNode(), "c": jnp.ones((2, 2))}
    assert labels_by(sj.is_hidden_matrix)(params) == {
        "a": None,
        "b": optax.MaskedNode(),
        "c": "matrices",
    }


def test_a_gradient_whose_squares_overflow_is_skipped_and_forgotten():
    """It is finite, but would make factors and second moments infinite for ever."""
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    tx = sj.shampoo(0.1)
    state, update = tx.init(params), jax.jit(tx.update)
    updates, state = update(params, state, params)
    huge, state = update(jax.tree.map(lambda p: 1e20 * (p + 1), params), state, params)
    again, state = update(params, state, params)
    assert state.total_notfinite == 1
    assert not any(x.any() for x in jax.tree.leaves(huge))
    assert jnp.abs(again["w"]).max() > 0.5 * jnp.abs(updates["w"]).max()


def test_a_complex_parameter_is_refused_wherever_it_is_routed():
    with pytest.raises(ValueError, match=r"\['b'\] is complex \(complex64\).*split_real_and_imag"):
        sj.shampoo(0.1).init({"b": jnp.ones(2, jnp.complex64)})


def test_both_halves_of_a_complex_parameter_are_routed_by_its_name():
    shapes = {"conv": {"kernel": (3, 3, 4, 8), "bias": (2, 4)}, "embed": (9, 4), "w": (4, 3)}
    shaped = functools.partial(jax.tree.map, is_leaf=lambda x: isinstance(x, tuple))
    seen = []

    def rule(path, leaf):
        seen.append(jax.tree_util.keystr(path))
        return sj.is_hidden_matrix(path, leaf)

    tx = optax.contrib.split_real_and_imaginary(sj.shampoo(0.1, preconditioned=rule))
    state = tx.init(shaped(lambda x: jnp.ones(x, jnp.complex64), shapes))
    real = sj.shampoo(0.1).init(shaped(jnp.ones, shapes))
    # Every stack has two blocks for one.
    assert sj.state_layout(state) == [{"36x8": [0, 1], "4x3": [2, 3]}]
    assert [list(x) for x in sj.state_layout(real)] == [["36x8", "4x3"]]
    assert set(seen) == {"['conv']['kernel']", "['conv']['bias']", "['embed']", "['w']"}
