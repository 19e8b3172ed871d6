"""The model against the torch benchmark script; A1 .. A11 are rows of the list of parity traps."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import nanogpt.model
from nanogpt.config import ModelConfig
from nanogpt.model import Linear, attention_implementation, rms_norm, rotate, soft_cap
from nanogpt.train_step import abstract_params, model_structure, summed_loss
from tests.oracles import speedrun


def bf16(x):
    return jnp.asarray(x).astype(jnp.bfloat16)


def build(z, **changes):
    config = speedrun.model_config(speedrun.read_json(z["config"]), **changes)
    graphdef = model_structure(config)
    params = speedrun.from_torch(speedrun.load("model_fp32.npz"), "param__")
    shapes = abstract_params(config)
    params = jax.tree.map(lambda s, p: jnp.asarray(p, s.dtype), shapes, params)
    return graphdef, params, {"inputs": z["inputs"], "targets": z["targets"]}


def loss_and_gradients(graphdef, params, batch):
    def function(p):
        loss, reported = summed_loss(graphdef, p, batch)
        return loss, (reported, nnx.merge(graphdef, p).raw_logits(batch["inputs"]))

    (_, (loss, raw)), grads = jax.jit(jax.value_and_grad(function, has_aux=True))(params)
    return loss, raw, grads


def test_float32_logits_and_gradients_equal_torch():
    """Rows A1, A3, A5 to A10 and A14 together: every constant, layout and sign, on summed loss."""
    z = speedrun.load("model_fp32.npz")
    graphdef, params, batch = build(z)
    loss, raw, grads = loss_and_gradients(graphdef, params, batch)
    np.testing.assert_allclose(loss, z["loss_sum"], rtol=1e-6)
    np.testing.assert_allclose(raw, z["logits_raw"], atol=3e-5, rtol=0)
    np.testing.assert_allclose(soft_cap(raw), z["logits"], atol=3e-5, rtol=0)
    expected = speedrun.by_path(speedrun.from_torch(z, "grad__"))
    actual = speedrun.by_path(grads)
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        worst = np.abs(actual[name] - grad).max() / np.abs(grad).max()
        assert worst <= 1e-5, (name, worst)


def test_bfloat16_logits_and_gradients_are_within_the_band():
    z = speedrun.load("model_bf16.npz")
    graphdef, params, batch = build(z, dtype="bfloat16", embed_dtype="bfloat16")
    loss, raw, grads = loss_and_gradients(graphdef, params, batch)
    assert raw.dtype == jnp.bfloat16
    raw = np.asarray(raw, np.float32)
    np.testing.assert_allclose(loss, z["loss_sum"], rtol=2e-3)
    np.testing.assert_allclose(raw, z["logits_raw"], atol=0.2, rtol=0)
    assert np.linalg.norm(raw - z["logits_raw"]) <= 2e-2 * np.linalg.norm(z["logits_raw"])
    actual = speedrun.by_path(grads)
    for name, grad in speedrun.by_path(speedrun.from_torch(z, "grad__")).items():
        assert np.linalg.norm(actual[name] - grad) <= 6e-2 * np.linalg.norm(grad), name


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


def test_a11_bfloat16_model_computes_in_bfloat16():
    """The golden bf16 file cannot tell bf16 from hidden float32, so the dtypes are asserted."""
    z = speedrun.load("model_bf16.npz")
    graphdef, params, batch = build(z, dtype="bfloat16", embed_dtype="bfloat16")
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
    z = speedrun.load("model_fp32.npz")
    graphdef, params, batch = build(z)
    monkeypatch.setattr(nanogpt.model, name, wrong)
    logits = jax.jit(lambda: nnx.merge(graphdef, params)(batch["inputs"]))()
    assert np.abs(logits - z["logits"]).max() > 1e-2


def cases(z):
    """Arrays of a file by case: {"c0": {"x": ...}, ...}."""
    split = [key.split("_", 1) for key in z if key[0] == "c" and key[1].isdigit()]
    return {case: {k: z[f"{c}_{k}"] for c, k in split if c == case} for case, _ in split}


def test_a1_rms_norm_equals_torch():
    """Cases c2 and c3 are small enough to feel the eps; bfloat16 may be off by 0.1 % of 1 ulp."""
    expected = cases(speedrun.load("rmsnorm.npz"))

    @jax.jit
    def compute(inputs):
        """Per case: output and gradients, in float32 and bfloat16; one compilation."""
        return {case: one(arrays) for case, arrays in inputs.items()}

    def one(arrays):
        gains = [arrays["gains"]] if "gains" in arrays else []
        out = {}
        for suffix, cast in (("", jnp.asarray), ("_bf16", bf16)):
            y, pullback = jax.vjp(rms_norm, cast(arrays["x" + suffix]), *gains)
            grads = pullback(cast(arrays["cotangent" + suffix]))
            names = ("grad_x" + suffix, "grad_gains" + suffix)
            out |= {"y" + suffix: y} | dict(zip(names, grads, strict=False))
        return out

    for case, results in compute(expected).items():
        for name, value in results.items():
            golden = expected[case][name]
            if name.endswith("bf16"):
                assert_equal_bf16(value, golden)
            else:
                scale = 2.0 if name == "y" else np.abs(golden).max()
                np.testing.assert_allclose(value, golden, atol=1e-6 * scale, rtol=0)


def assert_equal_bf16(actual, expected, allowed=1e-3):
    """Equal but for a fraction `allowed` of entries, which may be one ulp off."""
    bits = [np.asarray(x).astype(ml_dtypes.bfloat16).view(np.int16) for x in (actual, expected)]
    off = np.abs(bits[0].astype(int) - bits[1])
    assert off.max(initial=0) <= 1
    assert (off > 0).mean() <= allowed


def test_a8_rotary_embedding_equals_torch():
    """Case c2 reaches position 1023, where 1 ulp of a frequency is 6e-5 of a turn."""
    expected = cases(speedrun.load("rope.npz"))
    lengths = {case: arrays["positions"].max() + 1 for case, arrays in expected.items()}

    def at_positions(x, positions, length):
        whole = jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype)
        return rotate(whole.at[:, positions].set(x))[:, positions]

    def one(case, arrays):
        turn = functools.partial(at_positions, positions=arrays["positions"], length=lengths[case])
        y, pullback = jax.vjp(turn, arrays["x"])
        (grad,) = pullback(arrays["cotangent"])
        return {"y": y, "grad_x": grad, "y_bf16": turn(bf16(arrays["x_bf16"]))}

    compute = jax.jit(lambda inputs: {case: one(case, arrays) for case, arrays in inputs.items()})
    for case, results in compute(expected).items():
        tolerance = 5e-5 if case == "c2" else 2e-6
        for name in ("y", "grad_x"):
            np.testing.assert_allclose(results[name], expected[case][name], atol=tolerance, rtol=0)
        assert_equal_bf16(results["y_bf16"], expected[case]["y_bf16"])


def test_a9_cap_is_the_inverse_square_root_form():
    z = np.linspace(-300, 300, 101, dtype=np.float32)
    np.testing.assert_allclose(soft_cap(z), 15 * z / np.sqrt(z * z + 225), rtol=2e-6, atol=1e-6)


def test_a9_cap_reads_rounded_logits():
    """Rounding that XLA may not drop, as some backends drop a cast to bfloat16 and back."""
    z = speedrun.load("model_bf16.npz")
    graphdef, params, batch = build(z, dtype="bfloat16", embed_dtype="bfloat16")
    traced = jax.make_jaxpr(lambda p: nnx.merge(graphdef, p)(batch["inputs"]))(params)
    rounding = r"f32\[4,32,128\] = reduce_precision\[\s*exponent_bits=8\s+mantissa_bits=7"
    assert re.search(rounding, str(traced))


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


def test_a5_kernels_are_in_out():
    linear = Linear(jnp.ones((3, 5)), jnp.zeros(5))
    assert linear.kernel.shape == (3, 5) and linear(jnp.ones((2, 4, 3))).shape == (2, 4, 5)


def test_auto_attention_is_xla_here_and_an_explicit_choice_is_kept():
    shape = dict(vocab=8, layers=1, dim=16, head_dim=8, T=4)
    assert attention_implementation(speedrun.model_config(shape)) == "xla"
    assert attention_implementation(speedrun.model_config(shape, attention="cudnn")) == "cudnn"


def test_auto_attention_is_flash_attention_on_gpu_in_bfloat16(monkeypatch):
    shape = dict(vocab=8, layers=1, dim=16, head_dim=8, T=4)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention_implementation(speedrun.model_config(shape, dtype="bfloat16")) == "cudnn"
    assert attention_implementation(speedrun.model_config(shape)) == "xla"


def test_attention_is_causal():
    z = speedrun.load("model_fp32.npz")
    graphdef, params, batch = build(z)
    model = jax.jit(lambda tokens: nnx.merge(graphdef, params)(tokens))
    changed = batch["inputs"].copy()
    changed[:, 20:] = 0
    before, after = model(batch["inputs"]), model(changed)
    np.testing.assert_array_equal(before[:, :20], after[:, :20])
    assert np.abs(before[:, 20:] - after[:, 20:]).max() > 0.1
