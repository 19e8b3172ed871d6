"""Forty steps from the torch script's weights on its batches, optimizer by optimizer."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt.optimizers import build_optimizer
from nanogpt.presets import preset
from nanogpt.train_step import TrainState, make_eval_step, make_train_step, model_structure
from tests.oracles import speedrun

Z = speedrun.load("train_e2e.npz")
SHAPE = speedrun.read_json(Z["config"])


class Case(NamedTuple):
    optimizer: str
    matrices: dict  # changed settings of the block matrices
    schedule: dict  # changed settings of the schedule
    loss: float  # absolute tolerance of losses
    matrix_norm: float  # relative tolerances of parameter norms
    vector_norm: float


# Tolerances: a few times what the torch script itself moves under rounding noise, see the golden
# data's `spread_*`, or float32 norms summed in another order.
CASES = {
    "muon_f32ns": Case("muon_track3", {"ns_dtype": "float32"}, {}, 5e-6, 2e-5, 2e-5),
    "adamw": Case("adamw", {}, {"warmup_steps": SHAPE["warmup"]}, 5e-6, 2e-5, 5e-5),
    "shampoo": Case("shampoo", {}, {}, 1e-4, 2e-3, 6e-2),
    "shampoo_rtol_none": Case("shampoo", {"cutoff": "relative"}, {}, 5e-5, 5e-4, 3e-3),
}


def configuration(case):
    base = preset("track3", case.optimizer)
    return dataclasses.replace(
        base,
        model=speedrun.model_config(SHAPE),
        matrices=dataclasses.replace(base.matrices, **case.matrices),
        schedule=dataclasses.replace(base.schedule, steps=SHAPE["K"], **case.schedule),
        data=dataclasses.replace(
            base.data, batch_rows=SHAPE["batch_rows"], microbatch_rows=SHAPE["microbatch_rows"]
        ),
    )


def batch(tokens, start, rows):
    piece = tokens[start : start + rows * SHAPE["T"] + 1].astype(np.int32)
    return {
        "inputs": piece[:-1].reshape(rows, SHAPE["T"]),
        "targets": piece[1:].reshape(rows, SHAPE["T"]),
    }


def train(config):
    """Training losses, validation losses (before steps 0, 5, ..., K) and norms after each step."""
    params = jax.tree.map(jnp.asarray, speedrun.from_torch(Z, "init__"))
    tx = build_optimizer(config, params)
    graphdef = model_structure(config.model)
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(tx.init)(params))
    step, evaluate = make_train_step(graphdef, tx, config), make_eval_step(graphdef, config)
    rows, held_out = SHAPE["batch_rows"], batch(Z["val_tokens"], 0, SHAPE["val_rows"])
    losses, val, norms = [], [], []
    for s in range(SHAPE["K"] + 1):
        if s % 5 == 0:
            val.append(float(evaluate(state.params, held_out)) / held_out["targets"].size)
        if s < SHAPE["K"]:
            state, metrics = step(state, batch(Z["train_tokens"], s * rows * SHAPE["T"], rows))
            losses.append(float(metrics["loss"]))
            named = speedrun.by_path(state.params)
            norms.append({name: np.linalg.norm(value) for name, value in named.items()})
    return np.array(losses), np.array(val), norms


@pytest.mark.parametrize("kind", CASES)
def test_trajectory_equals_torch(kind):
    case = CASES[kind]
    losses, val, norms = train(configuration(case))
    np.testing.assert_allclose(losses[:4], Z[f"{kind}__train_loss"][:4], rtol=0, atol=5e-6)
    np.testing.assert_allclose(losses, Z[f"{kind}__train_loss"], rtol=0, atol=case.loss)
    np.testing.assert_allclose(val, Z[f"{kind}__val_loss"], rtol=0, atol=case.loss)
    for index, name in enumerate(map(speedrun.our_name, speedrun.read_json(Z["names"]))):
        expected = Z[f"{kind}__param_norm"][:, index]
        actual = [step[name] for step in norms]
        vector = name.endswith(("bias", "scale"))
        tolerance = case.vector_norm if vector else case.matrix_norm
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=1e-6, err_msg=name)
