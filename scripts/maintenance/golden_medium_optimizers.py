"""Muon, its Newton-Schulz iterations and AdamW of the medium track on recorded gradients."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanogpt.config.presets import preset
from nanogpt.config.run import AuxiliaryConfig, Config
from nanogpt.config.settings import AdamWConfig
from nanogpt.model.gpt import cut_to
from nanogpt.optimizers.build import build_optimizer
from nanogpt.optimizers.directions import momentum_schedule
from nanogpt.optimizers.schedules import eta
from scripts.maintenance.golden_medium_inputs import EXACT
from scripts.maintenance.golden_medium_model import probe
from scripts.maintenance.parity.measurement import Measurement, largest, ulps
from shampoo_jax import orthogonalize

Data = Mapping[str, np.ndarray]
# Of entries, norms (relative) and probes (over the norm), by precision of Newton-Schulz.
MUON = {"f32ns": (1e-6, 1e-7, 1e-6), "bf16ns": (3e-3, 1e-3, 2e-2)}
NS = {"f32": (5e-6, 5e-5), "bf16": (0.02, 0.3)}  # the second of what has not full rank
STEP = {"embed": 3e-6}  # of AdamW's parameters after each step; others:
OTHERS = 5e-7
NARROW_SHARE, NARROW_ULPS = (
    0.01,
    2.0,
)  # entries of a bfloat16 embedding that differ, and by how much


def muon(_: Path, z: Data) -> Iterator[Measurement]:
    """Weights after every update, in four variants, and the iteration alone."""
    config = json.loads(str(z["config"]))
    for variant in sorted({k.partition("__")[0] for k in z if "__sample__" in k}):
        yield from muon_variant(config, z, variant)
    for i, case in enumerate(json.loads(str(z["ns_cases"]))):
        yield from iteration(config, z, i, case)


def muon_variant(
    config: Mapping[str, Any], z: Data, variant: str, only: Sequence[str] = ()
) -> Iterator[Measurement]:
    """One of {rec8, fp32w} x {f32ns, bf16ns}: the record's decay of the MLPs, or the same for all.

    Args:
        config: of the file.
        z: the file.
        variant: name of it there.
        only: tensors; none for all.
    """
    names, name = list(only or config["names"]), f"muon_medium {variant}"
    entries, norms, probes = MUON[variant.partition("_")[2]]
    run = _muon_run(config, variant, z)
    steps = np.array(config["steps"])
    with jax.enable_x64(True):
        rates = run.matrices.learning_rate * eta(steps, run.schedule)
        momenta = momentum_schedule(run.matrices)(steps)  # type: ignore[arg-type]
    yield Measurement(name, "rate", largest(rates, z["lr"]), EXACT)
    yield Measurement(name, "momentum", largest(momenta, z["momentum"]), EXACT)
    history, momentum = _updates(run, config, z, names)
    worst = {"entries": 0.0, "norms": 0.0, "probes": 0.0, "momentum": 0.0}
    for n in names:
        ours = history[n]
        for t, (sample, norm) in enumerate(
            zip(z[f"{variant}__sample__{n}"], z[f"{variant}__norm__{n}"], strict=True)
        ):
            x = ours[t].astype(np.float64)
            worst["entries"] = max(worst["entries"], largest(x[..., ::8, ::8], sample))
            worst["norms"] = max(worst["norms"], abs(np.linalg.norm(x) / norm - 1))
            off = largest(probe(x), z[f"{variant}__probe__{n}"][t]) / norm
            worst["probes"] = max(worst["probes"], off)
        if f"{variant}__last__{n}" in z:
            worst["entries"] = max(worst["entries"], largest(ours[-1], z[f"{variant}__last__{n}"]))
        worst["momentum"] = max(
            worst["momentum"], largest(momentum[n][..., ::8, ::8], z[f"momentum_last__{n}"])
        )
        key = f"{variant}__bf16weight_last_sample__{n}"
        if key in z:
            seen = cut_to(jnp.asarray(z[f"{variant}__sample__{n}"][-1]), jnp.dtype("bfloat16"))
            yield Measurement(name, f"weights of {n} that the model sees", largest(seen, z[key]), 0)
    for what, limit in zip(worst, (entries, norms, probes, MUON["f32ns"][0]), strict=True):
        yield Measurement(name, what, float(worst[what]), limit)


def _muon_run(config: Mapping[str, Any], variant: str, z: Data) -> Config:
    base: Any = preset("medium", "muon_mlp_decay")
    doubled = max(config["wd_mul"].values()) if variant.startswith("rec8") else 1.0
    return dataclasses.replace(
        base,
        schedule=dataclasses.replace(base.schedule, steps=config["K"]),
        matrices=dataclasses.replace(
            base.matrices,
            learning_rate=config["base_lr"],
            weight_decay=config["weight_decay"],
            ns_coeffs=tuple(map(tuple, config["ns_coefficients"])),
            ns_steps=len(config["ns_coefficients"]),
            ns_dtype="bfloat16" if variant.endswith("bf16ns") else "float32",
            mlp_decay=doubled,
        ),
    )


def _updates(
    run: Config, config: Mapping[str, Any], z: Data, names: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """All weights after every update, and the momentum after the last, in the script's layout.

    Updates are those of the run's optimizer at the steps that the file names: its counts are set.
    """
    decayed = {n for n, factor in config["wd_mul"].items() if factor != 1}
    places = {n: _places(n, z[f"init__{n}"].shape, n in decayed) for n in names}
    params = _nested({p: x for n in names for p, x in _split(places[n], z[f"init__{n}"])})
    tx = build_optimizer(run, params)

    @jax.jit
    def step(params, state, gradients, at):
        state = jax.tree_util.tree_map_with_path(
            lambda path, x: at if jax.tree_util.keystr(path).endswith(".count") else x, state
        )
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state, history = tx.init(params), []
    for t, at in enumerate(config["steps"]):
        gradients = {
            n: z[f"grad_int8__{n}"][t].astype(np.float32) * z["grad_scale"][t] for n in names
        }
        tree = _nested({p: x for n in names for p, x in _split(places[n], gradients[n])})
        params, state = step(params, state, tree, jnp.int32(at))
        history.append({n: _joined(places[n], params) for n in names})
    (momentum,) = [x for _, x in optax.tree.get_all_with_path(state, "mu") if jax.tree.leaves(x)]
    stack = {n: np.stack([x[n] for x in history]) for n in names}
    return stack, {n: _joined(places[n], momentum) for n in names}


def _places(name: str, shape: tuple[int, ...], decayed: bool) -> list[tuple[str, ...]]:
    """Paths of a tensor's matrices in the model; those of the MLPs may have another decay."""
    room = ("blocks", "0", "mlp") if decayed else ("blocks", "0", "attn")
    own = [name] if len(shape) == 2 else [f"{name}{i}" for i in range(shape[0])]
    return [(*room, part, "kernel") for part in own]


def _split(places: list[tuple[str, ...]], x: np.ndarray) -> Iterator[tuple[tuple[str, ...], Any]]:
    parts = [x] if x.ndim == 2 else x
    return ((place, jnp.asarray(part.T)) for place, part in zip(places, parts, strict=True))


def _joined(places: list[tuple[str, ...]], tree: Any) -> np.ndarray:
    found = []
    for place in places:
        node = tree
        for key in place:
            node = node[key]
        found.append(np.asarray(node).T)
    return found[0] if len(found) == 1 else np.stack(found)


def _nested(arrays: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*parents, last), x in arrays.items():
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = x
    return tree


def iteration(config: Mapping[str, Any], z: Data, i: int, case: str) -> Iterator[Measurement]:
    """Newton-Schulz alone, in both precisions.

    Args:
        config: of the file.
        z: the file.
        i: number of the case.
        case: its name, which tells whether matrices have full rank.
    """
    coefficients = tuple(map(tuple, config["ns_coefficients"]))
    for dtype, limits in NS.items():
        tx = orthogonalize(
            steps=len(coefficients),
            coefficients=coefficients,
            eps=config["ns_eps"],
            dtype={"f32": None, "bf16": "bfloat16"}[dtype],
        )
        x = jnp.asarray(z[f"ns{i}_in"])
        parts = {str(j): part for j, part in enumerate(x if x.ndim == 3 else x[None])}
        made, _ = jax.jit(lambda parts, tx=tx: tx.update(parts, tx.init(parts)))(parts)
        out = np.stack([np.asarray(made[key]) for key in parts]).reshape(x.shape)
        error = largest(out, z[f"ns{i}_out_{dtype}"])
        yield Measurement(f"muon_medium Newton-Schulz {case}", dtype, error, limits["rank" in case])


def adam(_: Path, z: Data) -> Iterator[Measurement]:
    """Every group of AdamW in two recipes, and a bfloat16 embedding."""
    config = json.loads(str(z["config"]))
    for key in config["recipes"]:
        yield from recipe(config, z, key)


def recipe(config: Mapping[str, Any], z: Data, key: str) -> Iterator[Measurement]:
    """One recipe on every group that was recorded with it.

    Args:
        config: of the file.
        z: the file.
        key: name of the recipe.
    """
    warm, name = f"{key}__hidden" in z, f"adam_medium {key}"
    groups = [n for n in config["shapes"] if f"{key}__{n}" in z]
    if not groups:
        raise ValueError(f"recipe {key!r}: of none of its groups are there values.")
    for group in groups:
        run = _adam_run(config, group, config["warmup"] if warm else 0)
        with jax.enable_x64(True):
            rates = eta(np.arange(config["steps"]), run.schedule)
        yield Measurement(name, "eta", largest(rates, z[f"{key}__eta"]), EXACT)
        ours, _ = _replay(run, group, z, jnp.float32)
        error = largest(ours, z[f"{key}__{group}"])
        yield Measurement(name, group, error, STEP.get(group, OTHERS))
        if f"{key}__{group}_bf16" in z and group == "embed":
            ours, state = _replay(run, group, z, jnp.bfloat16)
            yield from _narrow(name, "embed_bf16", ours, z[f"{key}__embed_bf16"])
            moments = [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
            for which, moment in zip(("m", "v"), moments, strict=True):
                share, _ = ulps(moment, z[f"{key}__embed_bf16_{which}_last"])
                what = f"embed_bf16 {which}, entries that differ"  # some by all of it, near 0
                yield Measurement(name, what, share, NARROW_SHARE)


def _narrow(name: str, what: str, ours: Any, theirs: np.ndarray) -> Iterator[Measurement]:
    share, distance = ulps(np.asarray(ours, np.float32), theirs)
    yield Measurement(name, f"{what}, entries that differ", share, NARROW_SHARE)
    yield Measurement(name, f"{what}, ulps", distance, NARROW_ULPS)


def _adam_run(config: Mapping[str, Any], group: str, warmup: int) -> Config:
    base, told = preset("medium", "adamw"), config["groups"]
    rest = ("b1", "b2", "eps")
    own = {key: told[group][key] for key in rest}
    schedule = dataclasses.replace(
        base.schedule, steps=config["K"], cooldown=config["cooldown_frac"], warmup_steps=warmup
    )
    if group == "hidden":
        matrices = AdamWConfig(told["hidden"]["lr"], told["hidden"]["wd"], **own)
        return dataclasses.replace(base, matrices=matrices, schedule=schedule)
    rate = told[group]["lr"]
    auxiliary = AuxiliaryConfig(rate, rate, rate, told[group]["wd"], **own)
    return dataclasses.replace(base, auxiliary=auxiliary, schedule=schedule)


def _replay(run: Config, group: str, z: Data, dtype: Any) -> tuple[np.ndarray, Any]:
    """A parameter after every update, and the last state."""
    place = {"embed": ("embed", "embedding"), "scalars": ("scalars",)}.get(
        group, ("head", "kernel")
    )
    place = ("blocks", "0", "attn", "q", "kernel") if group == "hidden" else place
    tree = lambda x: _nested({place: jnp.asarray(x, dtype)})  # noqa: E731
    tx, params = build_optimizer(run, tree(z[f"init__{group}"])), tree(z[f"init__{group}"])

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    gradients = tree(z[f"grad__{group}"])
    (_, state), history = jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(p)), g))(
        params, gradients
    )
    return np.asarray(jax.tree.leaves(history)[0], np.float32), state
