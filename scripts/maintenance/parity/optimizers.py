"""AdamW and Muon, as the presets build them, on recorded gradients."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanogpt.config.presets import preset
from nanogpt.config.run import AuxiliaryConfig, Config, ScheduleConfig
from nanogpt.config.settings import AdamWConfig
from nanogpt.optimizers.build import build_optimizer
from scripts.maintenance.parity import golden
from scripts.maintenance.parity.measurement import Measurement, largest, ulps

STEPS = 12
ADAMW_RECIPES = ("tuned", "old", "matrices")
ADAMW_PATHS = {
    "embed": "embed/embedding",
    "head": "head/kernel",
    "head_bias": "head/bias",
    "gain": "norm1/scale",
    "late": "norm2/scale",
    "sparse": "sparse/bias",
    "mat": "blocks/0/attn/q/kernel",
}
MUON_NAMES = ("square", "tall", "wide", "odd", "rank3")


def replay(config: Config, params: optax.Params, gradients: optax.Updates) -> tuple[Any, Any]:
    """Applies recorded gradients one after the other.

    Args:
        config: Names the optimizer and its settings.
        params: Initial parameters.
        gradients: Of the structure of `params`, with a leading step axis.

    Returns:
        Parameters after each step, with a leading step axis, and the last optimizer state.
    """
    tx = build_optimizer(config, params)

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), history = jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(p)), g))(
        params, gradients
    )
    return history, state


def _nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": array} as {"a": {"b": array}}."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *folders, leaf = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = array
    return tree


def _adamw_config(recipe: Mapping[str, Any]) -> Config:
    rates, (b1, b2) = dict(recipe["groups"]), recipe["betas"]
    base = preset("track3", "adamw")
    auxiliary = AuxiliaryConfig(
        rates["embed"], rates["head"], rates["1d"], recipe["wd"], b1, b2, recipe["eps"]
    )
    matrices, schedule = base.matrices, ScheduleConfig(STEPS)
    if "mat" in recipe:
        block = recipe["mat"]
        b1, b2 = block["betas"]
        matrices = AdamWConfig(rates["mat"], block["wd"], b1, b2, block["eps"])
    if "warmup" in recipe:
        schedule = ScheduleConfig(STEPS, warmup_steps=recipe["warmup"], warmup_from=1e-7)
    return dataclasses.replace(base, matrices=matrices, auxiliary=auxiliary, schedule=schedule)


def adamw(recipe: str) -> Iterator[Measurement]:
    """Every group of AdamW, also where gradients are zero at first; then a bfloat16 embedding.

    Args:
        recipe: One of `ADAMW_RECIPES`.
    """
    name, z = f"adamw {recipe}", golden.load("adamw.npz")
    config = _adamw_config(golden.read_json(z["recipes"])[recipe])
    paths = {k: path for k, path in ADAMW_PATHS.items() if f"{recipe}__{k}" in z}
    params, gradients = (
        _nested({path: jnp.asarray(z[f"{prefix}__{k}"]) for k, path in paths.items()})
        for prefix in ("init", "grad")
    )
    history = golden.by_path(replay(config, params, gradients)[0])
    error = max(largest(history[path], z[f"{recipe}__{k}"]) for k, path in paths.items())
    yield Measurement(name, f"parameters, {STEPS} steps", error, 5e-6)

    narrow = (jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree) for tree in (params, gradients))
    history, state = replay(config, *({"embed": tree["embed"]} for tree in narrow))
    actual, expected = history["embed"]["embedding"], z[f"{recipe}__embed_bf16"]
    fraction = max(ulps(a, e)[0] for a, e in zip(actual, expected, strict=True))
    yield Measurement(name, "bfloat16 embedding, entries that differ at a step", fraction, 0.03)
    one_ulp = 2.0**-6  # of entries between 2 and 4, the largest
    error = largest(actual, expected)
    yield Measurement(name, "bfloat16 embedding, largest difference", error, one_ulp)
    moments = [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
    for moment, key in zip(moments, ("m", "v"), strict=True):
        fraction = ulps(moment, z[f"{recipe}_embed_bf16_{key}_last"])[0]
        yield Measurement(name, f"bfloat16 {key}, entries that differ", fraction, 0.03)


def muon_case(
    names: tuple[str, ...] = MUON_NAMES, **changes: Any
) -> tuple[Config, optax.Params, optax.Updates]:
    """The benchmark's Muon on recorded kernels.

    Args:
        names: Some of `MUON_NAMES`.
        **changes: Settings of the block matrices.

    Returns:
        What `replay` takes; kernels are (in, out).
    """
    z = golden.load("muon.npz")
    scale = z["grad_scale"][:, None, None]
    path = {name: f"blocks/0/mlp/{name}/kernel" for name in names}
    recorded = {name: np.float32(z["grad_int8__" + name]) * scale for name in names}
    params = _nested({path[n]: jnp.asarray(z["init__" + n].T) for n in names})
    gradients = _nested({path[n]: jnp.asarray(g.swapaxes(1, 2)) for n, g in recorded.items()})
    base = preset("track3", "muon_track3")
    matrices = dataclasses.replace(base.matrices, **changes)
    config = dataclasses.replace(base, matrices=matrices, schedule=ScheduleConfig(STEPS))
    return config, params, gradients


def muon_error(history: optax.Params, precision: str, name: str) -> float:
    """The largest deviation of a kernel over all steps that the file holds.

    Args:
        history: From `replay`.
        precision: "f32" or "bf16".
        name: One of `MUON_NAMES`.
    """
    z = golden.load("muon.npz")
    ours = np.asarray(history["blocks"]["0"]["mlp"][name]["kernel"]).swapaxes(1, 2)
    rows, columns = golden.read_json(z["config"])["sample_stride"]
    whole, last = f"param_{precision}__{name}", f"param_{precision}_last__{name}"
    if whole in z:
        return largest(ours, z[whole])
    worst = largest(ours[:, ::rows, ::columns], z[f"param_{precision}_sample__{name}"])
    return max(worst, largest(ours[-1], z[last]) if last in z else 0.0)


def muon(dtype: str) -> Iterator[Measurement]:
    """The benchmark's Muon; in bfloat16 a rank-deficient gradient gives the script noise as well.

    Args:
        dtype: Precision of the Newton-Schulz iteration.
    """
    name, z = f"muon, Newton-Schulz in {dtype}", golden.load("muon.npz")
    precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    history, state = replay(*muon_case(ns_dtype=dtype))
    full_rank = [n for n in MUON_NAMES if n != "rank3"]
    error = max(muon_error(history, precision, n) for n in full_rank)
    moved = max(float(z[f"spread_{precision}__{n}"].max()) for n in full_rank)
    tolerance = 5e-7 if dtype == "float32" else 1e-3
    yield Measurement(name, f"parameters, {STEPS} steps", error, tolerance, moved)
    if dtype == "bfloat16":
        return
    moved = float(z["spread_f32__rank3"].max())
    error = muon_error(history, "f32", "rank3")
    yield Measurement(name, "parameters under gradients of rank 3", error, 1e-4, moved)
    momentum = next(x for x in jax.tree.leaves(state) if x.shape == (24, 40)).T
    expected = z["momentum_last__odd"]
    error = largest(momentum, expected) / np.abs(expected).max()
    yield Measurement(name, "momentum, error / largest entry", error, 1e-5)


def newton_schulz() -> Iterator[Measurement]:
    """The orthogonalization alone: small (1e-4), tiny (1e-8, feels the eps of 1e-7) and zero."""
    z, cases = golden.load("muon.npz"), (2, 3, 4)
    kernels = {f"blocks/0/mlp/{case}/kernel": jnp.asarray(z[f"ns{case}_in"].T) for case in cases}
    params, base = _nested(kernels), preset("track3", "muon_track3")
    for dtype, key in (("float32", "out_f32"), ("bfloat16", "out_bf16")):
        changes: dict[str, Any] = {"b1": 0.0, "ns_dtype": dtype}
        config = dataclasses.replace(
            base,
            matrices=dataclasses.replace(
                base.matrices, learning_rate=1.0, weight_decay=0.0, **changes
            ),
            schedule=ScheduleConfig(1, cooldown=0.0),
        )
        once = jax.tree.map(lambda x: x[None], params)
        history = golden.by_path(replay(config, jax.tree.map(jnp.zeros_like, params), once)[0])
        error = 0.0
        for case, (path, kernel) in zip(cases, kernels.items(), strict=True):
            undo = max(1.0, kernel.shape[1] / kernel.shape[0]) ** 0.5
            error = max(error, largest(-history[path][0].T / undo, z[f"ns{case}_{key}"]))
        name, tolerance = f"muon, Newton-Schulz in {dtype}", {"float32": 2e-5}.get(dtype, 0.02)
        yield Measurement(name, "orthogonalized", error, tolerance)
