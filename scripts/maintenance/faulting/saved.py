"""Checkpoints as files with faults in them: what a restore makes of each."""

import contextlib
import functools
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from nanogpt.config.run import Config
from nanogpt.lab.command_line import read_config, split_arguments
from nanogpt.optimizers.build import build_optimizer
from nanogpt.train.batches import open_data
from nanogpt.train.checkpoint import Checkpoints
from nanogpt.train.digests import write_digests
from nanogpt.train.train_step import abstract_params, init_state
from scripts.maintenance.faulting.fuzz import Kind
from scripts.maintenance.faulting.rig import Rig

STEP = 0  # of the only checkpoint: fresh parameters, of which none is alike


@functools.cache
def _fresh() -> tuple[Config, Any]:
    """A run's settings and its first state; its shards lie in a folder that stays."""
    rig = Rig(pathlib.Path(tempfile.mkdtemp(prefix="shards-"))).with_shards()
    options, rest = split_arguments(rig.words("saved", "--matrices.b1", "0.9")[1:])
    config = read_config(options, "adamw", "saved", rest)
    optimizer = build_optimizer(config, abstract_params(config.model), None)
    state = init_state(config, optimizer, None)[1]
    chance = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: jax.numpy.asarray(chance.normal(size=x.shape), x.dtype), state)
    return config, noisy._replace(step=state.step)


def _checkpoints(folder: pathlib.Path) -> tuple[Checkpoints, Any]:
    config, _ = _fresh()
    data = open_data(config)
    return Checkpoints(folder / "checkpoints", config, data.fingerprint), data.training


def _save(folder: pathlib.Path) -> list[pathlib.Path]:
    checkpoints, data = _checkpoints(folder)
    with contextlib.closing(checkpoints), contextlib.closing(data):
        checkpoints.save(STEP, _fresh()[1], data, 1.5)
        checkpoints.wait()
    return [path for path in folder.rglob("*") if path.is_file()]


def _restore(folder: pathlib.Path) -> dict[str, np.ndarray]:
    checkpoints, data = _checkpoints(folder)
    with contextlib.closing(checkpoints), contextlib.closing(data):
        step, _ = checkpoints.newest()
        if step is None:
            raise ValueError("no checkpoint")
        state, seconds = checkpoints.restore(step, _fresh()[1], data)
    leaves = jax.tree.leaves_with_path(state)
    found = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return found | {"seconds": np.asarray(seconds), "step": np.asarray(step)}


def _restore_crafted(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """As somebody who can write the folder would have it: with digests that are right."""
    for checkpoint in (folder / "checkpoints").iterdir():
        write_digests(checkpoint)
    return _restore(folder)


CRAFTED = Kind("crafted checkpoints", _save, _restore_crafted)
CHECKPOINTS = Kind("checkpoints", _save, _restore, digest=True)
