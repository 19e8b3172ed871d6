"""Logits, gradients, norms and rotary embedding against the script's."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nanogpt.model.gpt import rms_norm, rotate, soft_cap
from nanogpt.train.train_step import Batch, abstract_params, model_structure, summed_loss
from scripts.maintenance.parity import golden
from scripts.maintenance.parity.measurement import Measurement, largest, ulps

BFLOAT16 = {"dtype": "bfloat16", "embed_dtype": "bfloat16"}


def build(**changes: Any) -> tuple[nnx.GraphDef, optax.Params, Batch]:
    """The recorded model with the recorded weights.

    Args:
        **changes: Fields of the `ModelConfig`; float32 without.

    Returns:
        Static part, parameters, and the batch whose logits and gradients were recorded.
    """
    z = golden.load("model_fp32.npz")
    config = golden.model_config(golden.read_json(z["config"]), **changes)
    params = golden.from_torch(z, "param__")
    params = jax.tree.map(lambda s, p: jnp.asarray(p, s.dtype), abstract_params(config), params)
    batch = {key: jnp.asarray(z[key]) for key in ("inputs", "targets")}
    return model_structure(config), params, batch


def _loss_and_gradients(**changes: Any) -> tuple[jax.Array, jax.Array, dict[str, np.ndarray]]:
    """Summed loss, logits before the cap, and the gradients by path."""
    graphdef, params, batch = build(**changes)

    def function(p):
        loss, reported = summed_loss(graphdef, p, batch)
        return loss, (reported, nnx.merge(graphdef, p).raw_logits(batch["inputs"]))

    (_, (loss, raw)), grads = jax.jit(jax.value_and_grad(function, has_aux=True))(params)
    return loss, raw, golden.by_path(grads)


def float32() -> Iterator[Measurement]:
    """The whole model in float32, on the loss summed over tokens."""
    name, z = "model_fp32", golden.load("model_fp32.npz")
    spread = golden.read_json(z["spread"])
    loss, raw, grads = _loss_and_gradients()
    total = float(z["loss_sum"])
    relative, moved = abs(float(loss) / total - 1), spread["loss_sum"] / total
    yield Measurement(name, "summed loss, relative", relative, 1e-6, moved)
    for key, logits in (("logits_raw", raw), ("logits", soft_cap(raw))):
        yield Measurement(name, key, largest(logits, z[key]), 3e-5, spread[key])
    expected = golden.by_path(golden.from_torch(z, "grad__"))
    worst = max(largest(grads[n], g) / np.abs(g).max() for n, g in expected.items())
    moved = max(spread[k] / np.abs(z[k]).max() for k in z if k.startswith("grad__"))
    yield Measurement(name, "gradients, largest error / largest entry", worst, 1e-5, moved)


def bfloat16() -> Iterator[Measurement]:
    """The whole model in the script's precisions; its spread is its distance from float32."""
    name, z = "model_bf16", golden.load("model_bf16.npz")
    spread = golden.read_json(z["deviation_from_fp32"])
    loss, raw, grads = _loss_and_gradients(**BFLOAT16)
    relative = abs(float(loss) / float(z["loss_sum"]) - 1)
    yield Measurement(name, "summed loss, relative", relative, 2e-3, spread["loss_rel"])
    raw = np.asarray(raw, np.float32)
    error = largest(raw, z["logits_raw"])
    yield Measurement(name, "logits_raw", error, 0.2, spread["logits_raw_max"])
    error = _frobenius(raw, z["logits_raw"])
    what = "logits_raw, relative Frobenius norm"
    yield Measurement(name, what, error, 2e-2, spread["logits_raw_rel_fro"])
    expected = golden.by_path(golden.from_torch(z, "grad__"))
    error = max(_frobenius(grads[n], g) for n, g in expected.items())
    spread = max(spread["grad_rel_fro"].values())
    yield Measurement(name, "gradients, relative Frobenius norm", error, 6e-2, spread)


def _frobenius(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


Arrays = Mapping[str, np.ndarray]


def _cases(name: str) -> dict[str, dict[str, np.ndarray]]:
    """Arrays of a file by case: {"c0": {"x": ...}, ...}."""
    z = golden.load(name)
    split = [key.split("_", 1) for key in z if key[0] == "c" and key[1].isdigit()]
    return {case: {k: z[f"{c}_{k}"] for c, k in split if c == case} for case, _ in split}


def _results(
    expected: Mapping[str, Arrays], one: Callable[[str, Arrays], dict[str, jax.Array]]
) -> dict[str, dict[str, jax.Array]]:
    """What `one` gives for each case, by a single compilation."""
    return jax.jit(lambda inputs: {c: one(c, arrays) for c, arrays in inputs.items()})(expected)


def _bits(name: str, results: Mapping, expected: Mapping[str, Arrays]) -> Iterator[Measurement]:
    """The bfloat16 results of all cases: equal but for rare differences of one ulp."""
    pairs = [
        ulps(value, expected[case][key])
        for case, values in results.items()
        for key, value in values.items()
        if key.endswith("bf16")
    ]
    fraction, distance = (max(column) for column in zip(*pairs, strict=True))
    what = "bfloat16, entries that differ"
    yield Measurement(name, what, fraction, 1e-3)
    yield Measurement(name, "bfloat16, largest distance in ulp", distance, 1.0)


def normalization() -> Iterator[Measurement]:
    """RMSNorm and its gradients; cases c2 and c3 are small enough to feel the eps."""
    name, expected = "rmsnorm", _cases("rmsnorm.npz")

    def one(_: str, arrays: Arrays) -> dict[str, jax.Array]:
        gains = [jnp.asarray(arrays["gains"])] if "gains" in arrays else []
        out = {}
        for suffix, dtype in (("", jnp.float32), ("_bf16", jnp.bfloat16)):
            x, cotangent = (jnp.asarray(arrays[k + suffix], dtype) for k in ("x", "cotangent"))
            y, pullback = jax.vjp(rms_norm, x, *gains)
            names = ("grad_x" + suffix, "grad_gains" + suffix)
            out |= {"y" + suffix: y} | dict(zip(names, pullback(cotangent), strict=False))
        return out

    results = _results(expected, one)
    error = max(largest(r["y"], expected[c]["y"]) for c, r in results.items())
    yield Measurement(name, "y", error, 2e-6)
    error = max(
        largest(r[k], expected[c][k]) / np.abs(expected[c][k]).max()
        for c, r in results.items()
        for k in ("grad_x", "grad_gains")
        if k in r
    )
    yield Measurement(name, "gradients, largest error / largest entry", error, 1e-6)
    yield from _bits(name, results, expected)


def rotary() -> Iterator[Measurement]:
    """RoPE and its gradient; case c2 reaches position 1023, where a frequency's ulp is 6e-5."""
    name, expected = "rope", _cases("rope.npz")
    lengths = {case: int(arrays["positions"].max()) + 1 for case, arrays in expected.items()}

    def at_positions(x, positions, length):
        whole = jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype)
        return rotate(whole.at[:, positions].set(x))[:, positions]

    def one(case: str, arrays: Arrays) -> dict[str, jax.Array]:
        turn = functools.partial(at_positions, positions=arrays["positions"], length=lengths[case])
        y, pullback = jax.vjp(turn, jnp.asarray(arrays["x"]))
        (grad,) = pullback(jnp.asarray(arrays["cotangent"]))
        return {"y": y, "grad_x": grad, "y_bf16": turn(jnp.asarray(arrays["x_bf16"], jnp.bfloat16))}

    results = _results(expected, one)
    for far in (False, True):
        cases = [case for case in expected if (lengths[case] > 1000) == far]
        what = f"y and gradient, positions below {max(lengths[c] for c in cases)}"
        error = max(largest(results[c][k], expected[c][k]) for c in cases for k in ("y", "grad_x"))
        yield Measurement(name, what, error, 5e-5 if far else 2e-6)
    yield from _bits(name, results, expected)
