"""Forty steps of training from the script's weights on its batches, optimizer by optimizer.

Gradients come from the real train step, with an optimizer that hands them out and changes nothing;
the run's own optimizer is then applied to them. So the expensive program is compiled once for all
optimizers, and gradients can be compared as well.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanogpt.config.presets import preset
from nanogpt.config.run import Config, ModelConfig
from nanogpt.optimizers.build import build_optimizer
from nanogpt.train.train_step import (
    Batch,
    TrainState,
    abstract_params,
    make_eval_step,
    make_train_step,
    model_structure,
)
from scripts.maintenance.parity import golden
from scripts.maintenance.parity.measurement import Measurement, largest

FILE = "train_e2e.npz"
VAL_EVERY = 5
HAND_OUT = optax.chain(optax.trace(decay=0.0), optax.set_to_zero())


class Kind(NamedTuple):
    """A recorded run, by what differs from the preset."""

    optimizer: str
    matrices: dict[str, Any]  # changed settings of the block matrices
    final: float  # tolerance of the final parameters, relative Frobenius norm


KINDS = {
    "muon_f32ns": Kind("muon_track3", {"ns_dtype": "float32"}, 1e-4),
    "muon_bf16ns": Kind("muon_track3", {}, 5e-2),
    "adamw": Kind("adamw", {}, 1e-4),
    "shampoo": Kind("shampoo", {}, 2e-2),
    "shampoo_rtol_none": Kind("shampoo", {"cutoff": "relative"}, 5e-3),
}
# Tolerances are five times what the script itself moves under rounding noise, plus what float32
# sums in another order may differ by.
TIMES, LOSS_FLOOR, NORM_FLOOR = 5, 5e-6, 1e-5


class Run(NamedTuple):
    """What a run leaves."""

    losses: np.ndarray  # [K], before each update
    val: np.ndarray  # before steps 0, 5, .., K
    gradients: np.ndarray  # [K, P], norms of summed gradients, in the order of recorded names
    norms: np.ndarray  # [K, P], norms of parameters after each update
    final: dict[str, np.ndarray]  # path -> parameters after the last update


def configuration(kind: str, dtype: str = "float32") -> Config:
    """The preset of a recorded run at the recorded size.

    Args:
        kind: Key of `KINDS`.
        dtype: Precision of activations and of the stored embedding.
    """
    z, entry = golden.load(FILE), KINDS[kind]
    shape = golden.read_json(z["config"])
    base = preset("track3", entry.optimizer)
    # AdamW's recorded run has the preset's warmup, but a shorter one.
    warmup = shape["warmup"] if kind == "adamw" else 0
    rows = {name: shape[name] for name in ("batch_rows", "microbatch_rows")}
    return dataclasses.replace(
        base,
        model=golden.model_config(shape, dtype=dtype, embed_dtype=dtype),
        matrices=dataclasses.replace(base.matrices, **entry.matrices),
        schedule=dataclasses.replace(base.schedule, steps=shape["K"], warmup_steps=warmup),
        data=dataclasses.replace(base.data, **rows),
    )


def _batch(tokens: np.ndarray, start: int, rows: int, length: int) -> Batch:
    piece = tokens[start : start + rows * length + 1].astype(np.int32)
    halves = {"inputs": piece[:-1], "targets": piece[1:]}
    return {key: jnp.asarray(half.reshape(rows, length)) for key, half in halves.items()}


@functools.cache
def _programs(model: ModelConfig, microbatch_rows: int) -> tuple[Callable, Callable]:
    """Train step that hands gradients out, and evaluation; compiled once for all optimizers."""
    base = preset("track3", "adamw")
    data = dataclasses.replace(base.data, microbatch_rows=microbatch_rows)
    config, graphdef = dataclasses.replace(base, model=model, data=data), model_structure(model)
    return make_train_step(graphdef, HAND_OUT, config), make_eval_step(graphdef, config)


def train(config: Config) -> Run:
    """Trains on the recorded batches, all `config.schedule.steps` of them."""
    z = golden.load(FILE)
    shape = golden.read_json(z["config"])
    rows, length = shape["batch_rows"], shape["T"]
    shapes = abstract_params(config.model)
    init = golden.from_torch(z, "init__")
    params = jax.tree.map(lambda s, p: jnp.asarray(p, s.dtype), shapes, init)
    tx = build_optimizer(config, params)
    step, evaluate = _programs(config.model, config.data.microbatch_rows)

    @jax.jit
    def apply(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    opt_state, handed_out = jax.jit(tx.init)(params), HAND_OUT.init(params)
    held_out = _batch(z["val_tokens"], 0, shape["val_rows"], length)
    losses, val, gradients, norms = [], [], [], []
    for s in range(config.schedule.steps + 1):
        if s % VAL_EVERY == 0:
            val.append(float(evaluate(params, held_out)) / held_out["targets"].size)
        if s < config.schedule.steps:
            before = TrainState(jnp.asarray(s), params, handed_out)
            after, metrics = step(
                before, _batch(z["train_tokens"], s * rows * length, rows, length)
            )
            losses.append(float(metrics["loss"]))
            handed_out = after.opt_state
            gradients.append(_norms(handed_out[0].trace))
            params, opt_state = apply(handed_out[0].trace, opt_state, after.params)
            norms.append(_norms(params))
    final = golden.by_path(params)
    return Run(np.array(losses), np.array(val), np.array(gradients), np.array(norms), final)


def _norms(tree: optax.Params) -> list[float]:
    """Norms of the arrays, in the order of the recorded names, as numpy sums: more exactly."""
    named = golden.by_path(tree)
    names = golden.read_json(golden.load(FILE)["names"])
    return [float(np.linalg.norm(named[golden.our_name(name)])) for name in names]


def _relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest relative error; where zero is expected, the largest value."""
    return largest(actual / np.where(expected == 0, 1, expected), np.sign(expected))


def trajectory(kind: str) -> Iterator[Measurement]:
    """A whole run in float32.

    Args:
        kind: Key of `KINDS`.
    """
    name, z, run = f"train_e2e {kind}", golden.load(FILE), train(configuration(kind))
    record = {key.removeprefix(f"{kind}__"): z[key] for key in z if key.startswith(f"{kind}__")}
    losses, spread = record["train_loss"], record["spread_train"]
    # Here Shampoo's two cutoffs differ most, by 3.2e-4.
    yield _losses(name, "first four losses", run.losses[:4], losses[:4], spread[:4])
    yield _losses(name, "losses", run.losses, losses, spread)
    yield _losses(name, "validation losses", run.val, record["val_loss"], record["spread_val"])
    vectors = np.array([n.endswith(("bias", "gains")) for n in golden.read_json(z["names"])])
    for what, columns in (("matrices", ~vectors), ("vectors", vectors)):
        norms, spread = (record[k][:, columns] for k in ("param_norm", "spread_param_norm"))
        spread = float((spread / np.where(norms == 0, 1, norms)).max())
        error = _relative(run.norms[:, columns], norms)
        tolerance = TIMES * spread + NORM_FLOOR
        yield Measurement(name, f"norms of {what}, relative", error, tolerance, spread)
    finals = {key: value for key, value in record.items() if key.startswith("final__")}
    theirs = golden.by_path(golden.from_torch(finals, "final__"))
    error = max(np.linalg.norm(run.final[n] - v) / np.linalg.norm(v) for n, v in theirs.items())
    what = "final parameters, relative Frobenius norm"
    yield Measurement(name, what, float(error), KINDS[kind].final)
    wrong = int(((record["grad_norm"] == 0) != (run.gradients == 0)).sum())
    yield Measurement(name, "gradients that are zero on one side only", wrong, 0)


def _losses(
    name: str, what: str, actual: np.ndarray, expected: np.ndarray, spread: np.ndarray
) -> Measurement:
    error = largest(actual, expected)
    return Measurement(name, what, error, loss_tolerance(spread), float(spread.max()))


def loss_tolerance(spread: np.ndarray) -> float:
    """How far losses in float32 may be from recorded ones whose spread this is."""
    return TIMES * float(spread.max()) + LOSS_FLOOR


def trajectory_in_bfloat16(kind: str) -> Iterator[Measurement]:
    """A whole run in the script's precisions.

    Its spread is the distance of the script's two runs, in bfloat16 and in float32; nearer than
    that to the first is what a run with hidden float32 could not be.

    Args:
        kind: Key of `KINDS`.
    """
    z, run = golden.load(FILE), train(configuration(kind, "bfloat16"))
    for key, ours in (("train_loss", run.losses), ("val_loss", run.val)):
        wide, expected = z[f"{kind}__{key}"], z[f"{kind}__{key}_bf16"]
        error, moved = largest(ours, expected), largest(expected, wide)
        yield Measurement(f"train_e2e {kind}, bfloat16", key, error, 0.8 * moved, moved)
