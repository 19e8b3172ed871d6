"""Optimizers whose checkpoints go on on other devices, with parameters and recorded gradients."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import optax

import shampoo_jax as sj
from nanogpt.config.presets import PRESETS, preset
from nanogpt.config.run import ModelConfig
from nanogpt.config.settings import MuonConfig
from nanogpt.optimizers.build import build_optimizer
from nanogpt.train.train_step import abstract_params
from scripts.maintenance.record_gradients import read_gradients
from scripts.maintenance.sharding_equality import OPTIMIZERS, SHAPES

RECORDED = pathlib.Path(__file__).parents[2] / "tests" / "golden" / "gradients" / "gpt_d128.npz"
# Orbax saves no empty arrays.
FILLED = {name: shape for name, shape in SHAPES.items() if 0 not in shape}
MODEL = ModelConfig(
    vocab_size=48, num_layers=2, model_dim=16, head_dim=8, mlp_dim=24, sequence_length=8
)


class Case(NamedTuple):
    """An optimizer and what it trains.

    Attributes:
        make: Optax transformation of a placement or None.
        shapes: tree of the parameters' shapes.
    """

    make: Callable[[sj.Placement | None], Any]
    shapes: Any


def _recipe(name: str) -> Case:
    """A recipe of track 3 as it is, on a small GPT, with all parameters and the whole chain."""
    config = dataclasses.replace(preset("track3", name), model=MODEL)
    shapes = jax.tree.map(lambda x: x.shape, abstract_params(MODEL))

    def make(placement: sj.Placement | None) -> Any:
        # All in the precision that is compared: bfloat16 would hide everything behind its rounding.
        dtype = str(jax.numpy.result_type(float))
        if isinstance(config.matrices, MuonConfig):
            object.__setattr__(config.matrices, "ns_dtype", dtype)  # no setting of a run's
        params = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, dtype), shapes, is_leaf=is_shape
        )
        return build_optimizer(config, params, placement)

    return Case(make, shapes)


def is_shape(found: Any) -> bool:
    """Whether a part of a tree is a shape."""
    return isinstance(found, tuple)


STAGGERED = OPTIMIZERS["eigh, ragged, staggered"]
WRAPPED = {
    "averaged": lambda p: sj.averaging(STAGGERED(p), "schedule_free", learning_rate=0.1),
    "accumulated": lambda p: optax.MultiSteps(
        STAGGERED(p), every_k_schedule=3
    ).gradient_transformation(),
}
CASES = {
    **{name: Case(make, FILLED) for name, make in (OPTIMIZERS | WRAPPED).items()},
    **{f"nanogpt {name}": _recipe(name) for name in PRESETS["track3"]},
}


def recorded(step: int, shapes: Any) -> Any:
    """Pieces of recorded gradients, a matrix and a place of it for each parameter of a tree."""
    matrices = list(read_gradients(RECORDED).values())
    leaves, structure = jax.tree.flatten(shapes, is_leaf=is_shape)
    found = []
    for number, shape in enumerate(leaves):
        source = matrices[number % len(matrices)]
        values = np.roll(source[step % len(source)], number + 7 * (step // len(source)), axis=0)
        rows, columns = (1, 1, *shape)[-2:]
        pieces = [
            values[rows * k % 80 :, columns * k % 80 :][:rows, :columns]
            for k in range(int(np.prod(shape[:-2])))
        ]
        found.append(np.array(pieces, np.float64).reshape(shape))
    return structure.unflatten(found)


def loss(params: Any, gradients: Any) -> jax.Array:
    """A loss whose gradient is near the one given, for optimizers that evaluate it again."""
    linear = optax.tree.vdot(gradients, params)
    return cast(jax.Array, linear + sum(jax.numpy.cos(x).sum() for x in jax.tree.leaves(params)))
