"""Whole runs of the medium track's model against recorded ones, step by step.

Gradients come from the real train step, which hands them out and changes nothing; the run's own
optimizer is then applied to them. So the dear program is compiled once for all runs of a file.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanogpt.config.presets import preset
from nanogpt.config.run import Config
from nanogpt.optimizers.build import build_optimizer
from nanogpt.optimizers.directions import momentum_schedule
from nanogpt.optimizers.schedules import eta, window_schedule
from nanogpt.train.loop import validation_due
from nanogpt.train.train_step import (
    TrainState,
    make_eval_step,
    make_train_step,
    model_structure,
)
from scripts.maintenance.golden_medium_inputs import EXACT
from scripts.maintenance.golden_medium_model import probe, start_of
from scripts.maintenance.golden_medium_tensors import (
    Tensors,
    beside,
    configuration,
    parameters,
    tensors_of,
    tree,
)
from scripts.maintenance.parity.measurement import Measurement, largest

Data = Mapping[str, np.ndarray]
HAND_OUT = optax.chain(optax.trace(decay=0.0), optax.set_to_zero())


class Allowed(NamedTuple):
    """Tolerances of a kind of run."""

    losses: float
    val: float
    norms: float  # of parameters, relative
    first: int = 0  # steps whose losses agree to `FIRST`
    finals: float | None = None  # of samples of the last parameters, and probes over norms
    gradients: float | None = None  # of norms of gradients, relative; None: noise decides them


FIRST = 1e-5
WARM = Allowed(5e-6, 5e-6, 1e-6, finals=1e-5, gradients=1e-5)
COLD = {
    "muon_f32ns": Allowed(5e-4, 1e-4, 1e-2, first=2),
    "muon_bf16ns": Allowed(5e-4, 5e-4, 2e-2),
    "adamw": Allowed(2e-4, 2e-4, 5e-3, first=3),
}


class Run(NamedTuple):
    """What a run leaves."""

    losses: np.ndarray  # [K]
    val: np.ndarray
    norms: np.ndarray  # [K, P], of parameters after the update
    gradients: np.ndarray  # [K, P], their norms
    final: Tensors


def trajectories(path: Path, z: Data) -> Iterator[Measurement]:
    """Every kind of run from the script's own start, and those that begin with random weights."""
    config, source = json.loads(str(z["config"])), beside(path)
    tensors, programs = parameters(source), {}
    for kind in config["kinds"]:
        run = _configuration(config, kind, config["K"], config["adamw_warmup"], config["val_every"])
        start = start_of(tensors, source["init_scalars"])
        yield from _compare(z, kind, run, train(run, config, z, start, programs), COLD[kind])
    warm = config["warm"]
    for kind in warm["kinds"]:
        run = _configuration(config, kind, warm["K"], warm["adamw_warmup"], warm["val_every"])
        found = train(run, config, z, tensors, programs)
        yield from _compare(z, f"warm_{kind}", run, found, WARM)


def _configuration(
    config: Mapping[str, Any], kind: str, steps: int, warmup: int, val_every: int
) -> Config:
    """A preset's run at the recorded size; each rank has a row."""
    base: Any = preset("medium", "adamw" if kind == "adamw" else "muon_mlp_decay")
    if kind != "adamw":
        dtype = {"muon_f32ns": "float32", "muon_bf16ns": "bfloat16"}[kind]
        base = dataclasses.replace(
            base, matrices=dataclasses.replace(base.matrices, ns_dtype=dtype)
        )
    world = config["world_size"]
    data = dataclasses.replace(
        base.data, batch_rows=world, microbatch_rows=1, val_length=config["val_T"]
    )
    schedule = dataclasses.replace(
        base.schedule, steps=steps, warmup_steps=warmup if kind == "adamw" else 0
    )
    return dataclasses.replace(
        base,
        model=configuration(config, attention="auto"),
        data=data,
        schedule=schedule,
        val_every=val_every,
        val_every_final=val_every,
    )


def _batch(tokens: np.ndarray, start: int, rows: int, length: int) -> dict[str, jax.Array]:
    piece = tokens[start : start + rows * length + 1].astype(np.int32)
    halves = {"inputs": piece[:-1], "targets": piece[1:]}
    return {key: jnp.asarray(half.reshape(rows, length)) for key, half in halves.items()}


def train(
    run: Config, config: Mapping[str, Any], z: Data, start: Tensors, programs: dict[int, Any]
) -> Run:
    """Trains on the recorded tokens.

    Args:
        run: at the recorded size.
        config: of the file.
        z: the file.
        start: parameters before the first step.
        programs: compiled before, by the number of steps, which decides windows.
    """
    world, length, steps = config["world_size"], config["T"], run.schedule.steps
    params, names = tree(run.model, start), json.loads(str(z["names"]))
    tx = build_optimizer(run, params)
    step, evaluate = programs.setdefault(steps, _programs(run))

    @jax.jit
    def apply(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    held_out = _batch(
        z["val_tokens"], 0, (len(z["val_tokens"]) - 1) // config["val_T"], config["val_T"]
    )
    state, handed_out = jax.jit(tx.init)(params), HAND_OUT.init(params)
    losses, val, norms, gradients = [], [], [], []
    for s in range(steps + 1):
        if validation_due(s, run):
            val.append(float(evaluate(params, held_out, s)) / held_out["targets"].size)
        if s == steps:
            break
        batch = _batch(z["train_tokens"], s * world * length, world, length)
        after, metrics = step(TrainState(jnp.int32(s), params, handed_out), batch)
        losses.append(float(metrics["loss"]))
        handed_out = after.opt_state
        gradients.append(_norms(handed_out[0].trace, names))
        params, state = apply(handed_out[0].trace, state, after.params)
        norms.append(_norms(params, names))
    return Run(*map(np.array, (losses, val, norms, gradients)), final=tensors_of(params))


def _programs(run: Config) -> tuple[Callable, Callable]:
    graphdef = model_structure(run.model)
    return make_train_step(graphdef, HAND_OUT, run), make_eval_step(graphdef, run)


def _norms(values: Any, names: list[str]) -> list[float]:
    found = tensors_of(values)
    return [float(np.linalg.norm(found[n])) for n in names]


def _compare(z: Data, key: str, run: Config, found: Run, allowed: Allowed) -> Iterator[Measurement]:
    name, record = (
        f"train_e2e {key}",
        {k.removeprefix(f"{key}__"): z[k] for k in z if k.startswith(f"{key}__")},
    )
    yield from _schedules(z, key, run)
    if len(found.val) != len(record["val_loss"]):
        raise ValueError(f"{key}: {len(record['val_loss'])} validations, not {len(found.val)}.")
    losses, first = record["train_loss"], allowed.first
    yield Measurement(name, "losses", largest(found.losses, losses), allowed.losses)
    if first:
        error = largest(found.losses[:first], losses[:first])
        yield Measurement(name, f"first {first} losses", error, FIRST)
    yield Measurement(name, "validation", largest(found.val, record["val_loss"]), allowed.val)
    error = _relative(found.norms, record["param_norm"])
    yield Measurement(name, "norms of parameters", error, allowed.norms)
    zero = (record["grad_norm"] == 0) != (found.gradients == 0)
    yield Measurement(name, "gradients that are 0 on one side only", float(zero.sum()), 0)
    if allowed.gradients is None or allowed.finals is None:
        return
    error = _relative(found.gradients, record["grad_norm"])
    yield Measurement(name, "norms of gradients", error, allowed.gradients)
    yield from _finals(z, name, record, found, allowed.finals)


def _schedules(z: Data, key: str, run: Config) -> Iterator[Measurement]:
    """Rates, windows, momenta and validations at every step."""
    name, prefix = f"train_e2e {key}", "warm_" if key.startswith("warm_") else ""
    steps = np.arange(run.schedule.steps)
    with jax.enable_x64(True):
        error = largest(eta(steps, run.schedule), z[f"{key}__eta"])
        yield Measurement(name, "eta", error, EXACT)
        if run.optimizer != "adamw":
            ours = momentum_schedule(run.matrices)(steps)  # type: ignore[arg-type]
            yield Measurement(name, "momentum", largest(ours, z[f"{prefix}muon_momentum"]), EXACT)
    windows = np.asarray(window_schedule(run)(steps))
    wrong = (windows != z[f"{prefix}window_blocks"]).sum()
    due = [s for s in range(run.schedule.steps + 1) if validation_due(s, run)]
    wrong += due != z[f"{prefix}val_steps"].tolist()
    yield Measurement(name, "windows and validation steps that differ", float(wrong), 0)


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return largest(ours / np.where(theirs == 0, 1, theirs), np.sign(theirs))


def _finals(z: Data, name: str, record: Data, found: Run, allowed: float) -> Iterator[Measurement]:
    """Samples of the last parameters, every so many entries, and probes of all of them."""
    samples, names = json.loads(str(z["config"]))["final_samples"], json.loads(str(z["names"]))
    for n, how in samples.items():
        ours = found.final[n][_slices(how)]
        yield Measurement(name, f"last {n}", largest(ours, record[f"final__{n}"]), allowed)
    worst = 0.0
    for n, theirs in zip(names, record["final_probe"], strict=True):
        x = found.final[n]
        worst = max(worst, largest(probe(x), theirs) / float(np.linalg.norm(x)))
    yield Measurement(name, "probes of the last parameters", worst, allowed)


def _slices(text: str) -> tuple[slice, ...]:
    """Slices by their text.

    >>> _slices("[:, ::8]"), _slices("all")
    ((slice(None, None, None), slice(None, None, 8)), (Ellipsis,))
    """
    if text == "all":
        return (...,)  # type: ignore[return-value]
    if not re.fullmatch(r"\[(:|::\d+|\.\.\.)(, (:|::\d+))*\]", text):
        raise ValueError(f"final_samples has {text!r}: it must be slices, as '[::8, ::8]'.")
    steps = [part.strip(": ") for part in text[1:-1].split(",")]
    return tuple(slice(None, None, int(step) if step else None) for step in steps)
