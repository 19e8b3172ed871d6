"""Losses, logits, activations and gradients of the medium track's model against recorded ones."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanogpt.config.run import ModelConfig
from nanogpt.model.gpt import rms_norm, soft_cap, widen_exactly
from nanogpt.model.loss import pairwise_sum, token_losses
from nanogpt.model.medium import MediumGPT
from nanogpt.train.train_step import model_structure
from scripts.maintenance.golden_medium_tensors import (
    Data,
    Tensors,
    beside,
    configuration,
    parameters,
    tensors_of,
    tree,
)
from scripts.maintenance.parity.measurement import Measurement, largest

# Recommended tolerances of the two precisions.
WIDE = {"loss": 3e-6, "nll": 1e-5, "logits": 1e-5, "norm": 2e-6, "probe": 6e-6, "grad": 3e-5}
NARROW = {"loss": 4e-3, "nll": 0.35, "logits": 0.4, "norm": 3e-2, "probe": 0.08, "grad": 5e-2}
NARROW_SCALARS, NARROW_LOGITS = 5e-2, 3e-2  # norms of the scalars' gradient; relative Frobenius


def probe(x: np.ndarray) -> np.ndarray:
    """Four sums over all entries with cosines of their places: permutations change them."""
    at = np.arange(1, x.size + 1)
    return np.array([(x.ravel() * np.cos(k * at)).sum() for k in range(1, 5)])


def program(config: ModelConfig, tokens: np.ndarray) -> Callable[..., Any]:
    """Function (parameters, window) -> gradients, and losses, logits and activations."""
    graphdef = model_structure(config)
    inputs, targets = (jnp.asarray(x.astype(np.int32)) for x in (tokens[None, :-1], tokens[1:]))

    def run(params: Any, window: jax.Array) -> Any:
        model: MediumGPT = nnx.merge(graphdef, params)
        streams = model.streams(inputs, window)
        final = rms_norm(streams[-1])
        raw = model.head(final)[0]
        nll = token_losses(raw, targets)
        told = {
            "loss": pairwise_sum(nll) / len(nll),
            "nll": nll,
            "logits": soft_cap(widen_exactly(raw)),
            "logits_raw": raw,
            "final_norm": final[0],
            "block_out": jnp.stack(streams)[:, 0],
        }
        return nll.mean(), told

    step = jax.value_and_grad(run, has_aux=True)
    # Half of the compilation, and what is computed once or twice need not be fast.
    return jax.jit(step, compiler_options={"xla_backend_optimization_level": 1})


def float32(_: Path, z: Data) -> Iterator[Measurement]:
    """The whole model in float32, and its start, whose gradients are 0 but for the head's."""
    config = json.loads(str(z["config"]))
    model, tensors = configuration(config), parameters(z)
    params, programs = tree(model, tensors), {}
    for case in _cases(z):
        sequence, window = case.split("_W")
        if sequence not in programs and sequence != "init":
            programs[sequence] = program(model, z[f"tokens_{sequence}"])
        if sequence == "init":
            continue
        (_, told), grads = programs[sequence](params, jnp.int32(window))
        own = tensors_of(grads)
        yield from _values(f"model_fp32 {case}", z, case, told, WIDE)
        yield from _gradients(f"model_fp32 {case}", z, case, own, WIDE)
        if f"{case}__block_out" in z:
            yield from _whole(z, own)
    yield from _start(z, model, tensors, programs)


def _cases(z: Data) -> list[str]:
    return [key.removesuffix("__loss") for key in z if key.endswith("__loss")]


def _values(
    name: str, z: Data, case: str, told: Mapping[str, jax.Array], allowed: Mapping[str, float]
) -> Iterator[Measurement]:
    """Losses, and logits and activations at the positions that were recorded."""
    at, acts = z["positions"], z["act_positions"]
    ours = {
        **{key: told[key] for key in ("loss", "nll")},
        **{key: told[key][at] for key in ("logits", "logits_raw")},
        "loss_eval": told["loss"],
        "final_norm": told["final_norm"][acts],
        "block_out": told["block_out"][:, acts],
    }
    for key, value in ours.items():
        if f"{case}__{key}" not in z:
            continue
        theirs = z[f"{case}__{key}"]
        kind = {"loss_eval": "loss", "loss": "loss", "nll": "nll"}.get(key, "logits")
        relative = kind == "logits" and allowed is NARROW
        if not relative or key == "logits":
            yield Measurement(name, key, largest(value, theirs), allowed[kind])
        if relative:
            yield Measurement(name, f"{key}, Frobenius", frobenius(value, theirs), NARROW_LOGITS)


def frobenius(ours: Any, theirs: np.ndarray) -> float:
    """Relative error; where 0 is expected, the norm itself."""
    norm = np.linalg.norm(theirs)
    return float(np.linalg.norm(np.asarray(ours, np.float64) - theirs) / (norm if norm else 1))


def _gradients(
    name: str, z: Data, case: str, own: Tensors, allowed: Mapping[str, float]
) -> Iterator[Measurement]:
    """Norms and probes of all gradients."""
    names = json.loads(str(z["names"]))
    worst = {"norm": 0.0, "scalars": 0.0, "probe": 0.0, "absmax": 0.0}
    for i, n in enumerate(names):
        norm, probed = z[f"{case}__grad_norm"][i], z[f"{case}__grad_probe"][i]
        key = "scalars" if n == "scalars" else "norm"
        off = np.abs(probe(own[n]) - probed).max() / (norm or 1)
        worst["probe"] = max(worst["probe"], off)
        length = float(np.linalg.norm(own[n]))
        worst[key] = max(worst[key], abs(length / (norm or 1) - bool(norm)))
        if f"{case}__grad_absmax" in z:
            most = z[f"{case}__grad_absmax"][i]
            off = abs(np.abs(own[n]).max() / (most or 1) - bool(most))
            worst["absmax"] = max(worst["absmax"], off)
    scalars = NARROW_SCALARS if allowed is NARROW else allowed["norm"]
    limits = {**allowed, "scalars": scalars, "absmax": allowed["grad"]}
    for what, error in worst.items():
        yield Measurement(name, f"gradients, {what}", float(error), limits[what])


def _whole(z: Data, own: Tensors) -> Iterator[Measurement]:
    """All entries of the gradients of one case; most are stored as int16, with a scale a row."""
    worst = 0.0
    for n, x in own.items():
        if f"grad__{n}" in z:
            theirs = z[f"grad__{n}"].astype(np.float64)
        else:
            stored = z[f"grad_int16__{n}"].astype(np.float64)
            scales = z[f"grad_rowscale__{n}"].reshape(*stored.shape[:-1], 1)
            theirs = stored * scales
        worst = max(worst, largest(x, theirs) / np.abs(theirs).max())
    yield Measurement("model_fp32", "gradients, entries", worst, WIDE["grad"])


def start_of(tensors: Tensors, scalars: np.ndarray) -> Tensors:
    """The script's start with these random matrices: what it sets to 0 is 0."""
    made = {n: x.copy() for n, x in tensors.items()}
    for n, x in made.items():
        if n.endswith("qkvo_w"):
            x[3] = 0
        elif n.endswith("proj_w") or n == "lm_head_w":
            x[:] = 0
    return made | {"scalars": scalars}


def _start(
    z: Data, model: ModelConfig, tensors: Tensors, programs: Mapping[str, Callable]
) -> Iterator[Measurement]:
    params = tree(model, start_of(tensors, z["init_scalars"]))
    for case in (case for case in _cases(z) if case.startswith("init_")):
        name, window = f"model_fp32 {case}", jnp.int32(case.partition("_W")[2])
        (_, told), grads = next(iter(programs.values()))(params, window)
        own = tensors_of(grads)
        head = own.pop("lm_head_w")
        yield Measurement(name, "loss", largest(told["loss"], z[f"{case}__loss"]), WIDE["loss"])
        norm = z[f"{case}__grad_norm_head"]
        error = abs(np.linalg.norm(head) / norm - 1)
        yield Measurement(name, "norm of the head's gradient", float(error), WIDE["norm"])
        error = largest(probe(head), z[f"{case}__grad_probe_head"]) / norm
        yield Measurement(name, "probe of the head's gradient", float(error), WIDE["probe"])
        if f"{case}__grad_head" in z:
            theirs = z[f"{case}__grad_head"]
            error = largest(head, theirs) / np.abs(theirs).max()
            yield Measurement(name, "the head's gradient", float(error), WIDE["grad"])
        others = float(max(np.abs(x).max() for x in own.values()))
        yield Measurement(name, "largest of the other gradients", others, 0)


def bfloat16(path: Path, z: Data) -> Iterator[Measurement]:
    """The whole model in the script's precisions, which are asserted, too."""
    config, source = json.loads(str(z["config"])), beside(path)
    model = configuration(config, dtype="bfloat16", embed_dtype="bfloat16")
    params = tree(model, parameters(source))
    run = program(model, source["tokens_A"])
    yield from _dtypes(z, run, params)
    for case in _cases(z):
        (_, told), grads = run(params, jnp.int32(case.partition("_W")[2]))
        own, name = tensors_of(grads), f"model_bf16 {case}"
        yield from _values(name, z, case, told, NARROW)
        yield from _gradients(name, z, case, own, NARROW)
        if f"{case}__block_out" in z:
            errors = [frobenius(own[k[6:]], x) for k, x in z.items() if k.startswith("grad__")]
            yield Measurement(name, "gradients, Frobenius", max(errors), NARROW["grad"])
        wide = {n for n, kind in json.loads(str(z["grad_dtypes"])).items() if "32" in kind}
        narrow = [x for n, x in own.items() if n not in wide]
        spare = sum((x != np.asarray(jnp.asarray(x, "bfloat16"), np.float64)).sum() for x in narrow)
        yield Measurement(name, "gradients that bfloat16 does not hold", float(spare), 0)


def _dtypes(z: Data, run: Callable, params: Any) -> Iterator[Measurement]:
    (_, told), grads = jax.eval_shape(run, params, jnp.int32(1))
    names = {"raw": "logits_raw", "x": "block_out", "z": "logits"}
    told = {key: told[name].dtype.name for key, name in names.items()}
    theirs = {k: v.removeprefix("torch.") for k, v in json.loads(str(z["dtypes"])).items()}
    yield Measurement("model_bf16", "dtypes that differ", float(told != theirs), 0)
    stored = {
        "embed.weight": grads["embed"]["embedding"].dtype.name,
        "lm_head_w": grads["head"]["kernel"].dtype.name,
    }
    for name, ours in stored.items():
        kind = json.loads(str(z["grad_dtypes"]))[name].removeprefix("torch.")
        yield Measurement("model_bf16", f"dtype of {name}'s gradient", float(ours != kind), 0)
