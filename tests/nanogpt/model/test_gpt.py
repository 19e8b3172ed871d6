"""The model against the torch benchmark script."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nanogpt.model.gpt
from nanogpt.config.run import ModelConfig
from nanogpt.model.gpt import GPT, Linear, rms_norm, rotate, soft_cap
from nanogpt.train.train_step import abstract_params
from scripts.maintenance.parity import golden
from scripts.maintenance.parity import model as parity
from scripts.maintenance.parity.measurement import misses


@pytest.mark.trap("A1", "A3", "A5", "A6", "A7", "A8", "A9", "A10", "A14")
def test_float32_logits_and_gradients_equal_torch():
    """Every constant, layout and sign together, on summed loss."""
    assert not misses(parity.float32())


def test_bfloat16_logits_and_gradients_are_within_the_band():
    assert not misses(parity.bfloat16())


def dot_operands(jaxpr):
    """Dtypes of the operands of every matrix product in a jaxpr, nested ones included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield from (variable.aval.dtype for variable in equation.invars)
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from dot_operands(inner)


@pytest.mark.trap("A11")
def test_a11_bfloat16_model_computes_in_bfloat16():
    """The golden bf16 file cannot tell bf16 from hidden float32, so the dtypes are asserted."""
    graphdef, params, batch = parity.build(**parity.BFLOAT16)
    model = nnx.merge(graphdef, params)
    stream = jnp.ones((1, 32, 64), jnp.bfloat16)
    assert jax.eval_shape(model.blocks[0], stream).dtype == jnp.bfloat16
    assert jax.eval_shape(model.norm1, stream).dtype == jnp.bfloat16
    traced = jax.make_jaxpr(lambda p: nnx.merge(graphdef, p)(batch["inputs"]))(params)
    operands = list(dot_operands(traced.jaxpr))
    assert len(operands) >= 2 * (6 * 2 + 1)  # six Linears a block, and the head
    assert set(operands) == {jnp.dtype(jnp.bfloat16)}
    assert traced.out_avals[0].dtype == jnp.float32  # A9: the cap is taken in float32


def flipped(x):
    """The usual convention of rotary embeddings: the opposite sign."""
    return rotate(x[..., ::-1])[..., ::-1]


@pytest.mark.trap("A7", "A8", "A9")
@pytest.mark.parametrize(
    "name, wrong",
    [
        pytest.param("ATTENTION_SCALE", 32**-0.5, id="A7-scale"),
        pytest.param("rotate", lambda x: x, id="A8-no-rotation"),
        pytest.param("rotate", flipped, id="A8-sign"),
        pytest.param("soft_cap", lambda z: 15 * jnp.tanh(z / 15), id="A9-tanh"),
        pytest.param("rms_norm", lambda x, gain=None: x if gain is None else rms_norm(x, gain),
                     id="A7-no-qk-norm"),
    ],
)  # fmt: skip
def test_golden_logits_tell_the_trap(monkeypatch, name, wrong):
    graphdef, params, batch = parity.build()
    monkeypatch.setattr(nanogpt.model.gpt, name, wrong)
    logits = jax.jit(lambda: nnx.merge(graphdef, params)(batch["inputs"]))()
    assert np.abs(logits - golden.load("model_fp32.npz")["logits"]).max() > 1e-2


@pytest.mark.trap("A1")
def test_a1_rms_norm_equals_torch():
    assert not misses(parity.normalization())


@pytest.mark.trap("A8")
def test_a8_rotary_embedding_equals_torch():
    assert not misses(parity.rotary())


@pytest.mark.trap("A9")
def test_a9_cap_is_the_inverse_square_root_form():
    z = np.linspace(-300, 300, 101, dtype=np.float32)
    np.testing.assert_allclose(soft_cap(z), 15 * z / np.sqrt(z * z + 225), rtol=2e-6, atol=1e-6)


@pytest.mark.trap("A9")
def test_a9_cap_reads_rounded_logits():
    """Rounding that XLA may not drop, as some backends drop a cast to bfloat16 and back."""
    graphdef, params, batch = parity.build(**parity.BFLOAT16)
    traced = jax.make_jaxpr(lambda p: nnx.merge(graphdef, p)(batch["inputs"]))(params)
    rounding = r"f32\[4,32,128\] = reduce_precision\[\s*exponent_bits=8\s+mantissa_bits=7"
    assert re.search(rounding, str(traced))


@pytest.mark.trap("A2", "A6", "A10", "A12")
def test_a6_parameters_of_track3():
    """72 block matrices of order 2 (q, k, v apart), 26 gains (A2), 162,354,816 numbers."""
    config = ModelConfig(
        vocab_size=50304, num_layers=12, model_dim=768, head_dim=128, mlp_dim=3072,
        sequence_length=1024,
    )  # fmt: skip
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))
    }
    assert sum(leaf.size for leaf in shapes.values()) == 162_354_816
    matrices = [leaf.shape for name, leaf in shapes.items() if name.startswith("blocks")
                and leaf.ndim > 1]  # fmt: skip
    assert sorted(set(matrices)) == [(768, 768), (768, 3072), (3072, 768)]
    assert [matrices.count(s) for s in sorted(set(matrices))] == [48, 12, 12]
    assert sum(name.endswith("scale") for name in shapes) == 26
    # A10: untied, biased head of all 50304 columns in float32; A12: bfloat16 embedding.
    assert shapes["head/kernel"].shape == (768, 50304) and shapes["head/bias"].shape == (50304,)
    assert {name for name, leaf in shapes.items() if leaf.dtype != jnp.float32} == {
        "embed/embedding"
    }
    assert shapes["embed/embedding"].dtype == jnp.bfloat16


@pytest.mark.trap("A5")
def test_a5_kernels_are_in_out():
    linear = Linear(jnp.ones((3, 5)), jnp.zeros(5))
    assert linear.kernel.shape == (3, 5) and linear(jnp.ones((2, 4, 3))).shape == (2, 4, 5)


def lowered_attention(monkeypatch, platform, *, cudnn=jnp.sin, **options):
    """A model's program for a platform, with stand-ins for both kernels."""
    kernel = {"cudnn": cudnn, "xla": jnp.cbrt}
    stand_in = lambda q, k, v, *, implementation, **_: kernel[implementation](q)  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    shape = dict(vocab=8, layers=1, dim=16, head_dim=8, T=4)
    graphdef, params = nnx.split(GPT(golden.model_config(shape, **options), nnx.Rngs(0)))
    loss = lambda p, tokens: nnx.merge(graphdef, p)(tokens).sum()  # noqa: E731
    traced = jax.jit(jax.value_and_grad(loss)).trace(params, jnp.zeros((2, 4), jnp.int32))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("platform", "options", "flash"),
    [
        ("cuda", dict(dtype="bfloat16"), True),
        *((name, dict(dtype="bfloat16"), False) for name in ("cpu", "rocm", "tpu")),
        ("cuda", dict(), False),
        ("cuda", dict(dtype="bfloat16", attention="xla"), False),
        ("cpu", dict(attention="cudnn"), True),
    ],
)
def test_the_platform_that_is_lowered_for_chooses_attention(monkeypatch, platform, options, flash):
    text = lowered_attention(monkeypatch, platform, **options)
    assert ("sine" in text, "cbrt" in text) == (flash, not flash)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, ValueError])
def test_auto_attention_is_xla_where_cudnn_refuses(monkeypatch, error):
    def refuse(_):
        raise error("cuDNN is not detected.")

    text = lowered_attention(monkeypatch, "cuda", cudnn=refuse, dtype="bfloat16")
    assert "cbrt" in text
    with pytest.raises(error, match="cuDNN"):
        lowered_attention(monkeypatch, "cuda", cudnn=refuse, attention="cudnn")


def test_attention_is_causal():
    graphdef, params, batch = parity.build()
    model = jax.jit(lambda tokens: nnx.merge(graphdef, params)(tokens))
    changed = np.array(batch["inputs"])
    changed[:, 20:] = 0
    before, after = model(batch["inputs"]), model(changed)
    np.testing.assert_array_equal(before[:, :20], after[:, :20])
    assert np.abs(before[:, 20:] - after[:, 20:]).max() > 0.1


def test_activations_computed_again_change_no_gradient():
    config = ModelConfig(32, 2, 16, 8, 32, 8, dtype="float32", embed_dtype="float32")
    tokens = jnp.arange(16).reshape(2, 8)
    gradients, kept = [], []
    for remat in (False, True):
        model = nanogpt.model.gpt.GPT(dataclasses.replace(config, remat=remat), nnx.Rngs(0))
        model.head.kernel[...] += jnp.arange(32) / 32
        graphdef, params = nnx.split(model)
        logits, pull = jax.vjp(lambda p, g=graphdef: nnx.merge(g, p)(tokens), params)
        gradients.append(pull(logits)[0])
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(pull)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *gradients)
    assert kept[1] < 0.7 * kept[0]
