"""Checkpoints that go on on another number of devices: how far from never having moved.

    python -m scripts.maintenance.elastic

Every optimizer of `sharding_equality`, weights that are averaged and gradients that are accumulated
take steps with recorded gradients in float64, on fake CPU devices. The state after `SAVED` of them,
in the middle of an interval and of an accumulation, goes through a run's own checkpoint code to
every other layout, and takes the rest there. Compared with the undisturbed steps of the layout that
saved.
"""

import contextlib
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

if __name__ == "__main__":
    flags = (os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    defaults = {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1", "NPROC": "32"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

import shampoo_jax as sj
from nanogpt.config.presets import preset
from nanogpt.train.checkpoint import Checkpoints
from nanogpt.train.mesh import AXES
from nanogpt.train.mesh import Layout as MeshLayout
from nanogpt.train.train_step import TrainState
from scripts.maintenance.record_gradients import read_gradients
from scripts.maintenance.sharding_equality import OPTIMIZERS, SHAPES, place, worst_errors

RECORDED = pathlib.Path(__file__).parents[2] / "tests" / "golden" / "gradients" / "gpt_d128.npz"
SAVED, STEPS = 4, 24  # 20 steps after a restore
# Devices along data and fsdp; None: one device without a mesh.
LAYOUTS: dict[str, tuple[int, int] | None] = {
    **{f"{n}": (n, 1) for n in (8, 4, 2, 1)},
    **{"2x4": (2, 4), "no mesh": None},
}
WRAPPED: dict[str, Callable[..., Any]] = {
    "averaged": lambda p: sj.averaging(
        OPTIMIZERS["eigh, ragged, staggered"](p), "schedule_free", learning_rate=0.1
    ),
    "accumulated": lambda p: optax.MultiSteps(
        OPTIMIZERS["eigh, ragged, staggered"](p), every_k_schedule=3
    ).gradient_transformation(),
}
ALL = OPTIMIZERS | WRAPPED


def recorded(step: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Pieces of recorded gradients, a matrix and a place of it for each parameter."""
    matrices = list(read_gradients(RECORDED).values())
    found = {}
    for number, (name, shape) in enumerate(shapes.items()):
        source = matrices[number % len(matrices)]
        values = np.roll(source[step % len(source)], number + 7 * (step // len(source)), axis=0)
        rows, columns = (1, 1, *shape)[-2:]
        pieces = [
            values[rows * k % 96 :, columns * k % 96 :][:rows, :columns]
            for k in range(int(np.prod(shape[:-2])))
        ]
        found[name] = np.array(pieces, np.float64).reshape(shape)
    return found


class Trainer:
    """Some optimizers on one layout, compiled as one program.

    Args:
        optimizers: functions of a placement or None, by name.
        shapes: of the parameters.
        layout: one of `LAYOUTS`.
    """

    def __init__(
        self,
        optimizers: Mapping[str, Callable[..., Any]],
        shapes: Mapping[str, tuple[int, ...]],
        layout: str,
    ):
        self._shapes, self._placement, sizes = shapes, None, LAYOUTS[layout]
        if sizes is not None:
            devices = jax.devices()[: sizes[0] * sizes[1]]
            mesh = jax.make_mesh(sizes, AXES, (AxisType.Auto,) * 2, devices=devices)
            self._placement = MeshLayout(mesh).placement
        transforms = {name: make(self._placement) for name, make in optimizers.items()}

        def init(params: Any) -> TrainState:
            states = {name: tx.init(params) for name, tx in transforms.items()}
            return TrainState(jnp.int32(0), dict.fromkeys(transforms, params), states)

        def step(state: TrainState, grads: Any) -> tuple[Any, TrainState]:
            done = {
                name: tx.update(grads, state.opt_state[name], state.params[name])
                for name, tx in transforms.items()
            }
            updates = {name: one for name, (one, _) in done.items()}
            params = optax.apply_updates(state.params, updates)
            states = {name: one for name, (_, one) in done.items()}
            return updates, TrainState(state.step + 1, params, states)

        self.fresh = jax.jit(init)(self._gradients(0))
        where = None if sizes is None else (None, jax.tree.map(lambda x: x.sharding, self.fresh))
        # Values are compared, not times, and most of the time here is the compiler's.
        quick: dict[str, bool | str] = {"xla_backend_optimization_level": "0"}
        lowered = jax.jit(step, out_shardings=where).lower(self.fresh, self._gradients(0))
        self._step = lowered.compile(compiler_options=quick)

    def train(self, state: TrainState, steps: int) -> tuple[list[Any], TrainState]:
        """Takes steps; returns the updates of each, and the last state."""
        history = []
        for _ in range(steps):
            updates, state = self._step(state, self._gradients(int(state.step) + 1))
            history.append(jax.tree.map(np.asarray, updates))
        return history, state

    def _gradients(self, step: int) -> Any:
        grads = jax.tree.map(jnp.asarray, recorded(step, self._shapes))
        return place(grads, self._placement)


class Folder:
    """A run's checkpoints, with data that are only counted."""

    def __init__(self, path: str):
        self._checkpoints = Checkpoints(pathlib.Path(path), preset("cpu", "shampoo"), "no data")

    def save(self, state: TrainState) -> None:
        """Saves, and waits for it."""
        data = iter(grain.MapDataset.range(1000).to_iter_dataset())
        grain.experimental.set_next_index(data, int(state.step))
        self._checkpoints.save(int(state.step), state, data, 0.0)
        self._checkpoints.wait()
        data.close()

    def restore(self, like: TrainState) -> TrainState:
        """The newest one, on the devices of another state."""
        data = iter(grain.MapDataset.range(1000).to_iter_dataset())
        step = self._checkpoints.newest()[0]
        state, _ = self._checkpoints.restore(step or 0, like, data)
        data.close()
        return state

    def close(self) -> None:
        """Frees the threads."""
        self._checkpoints.close()


def moved(trainer: Callable[[str], Trainer], way: Sequence[str], steps: int) -> dict[str, float]:
    """Takes steps on one layout after the other, with a checkpoint between two.

    Args:
        trainer: makes that of a layout.
        way: layouts; the first saves after `SAVED` steps, the others share those that are left.
        steps: in all.

    Returns:
        By optimizer, the largest difference of any update from the undisturbed steps of the first
        layout, over the largest entry of that update.
    """
    first = trainer(way[0])
    expected, _ = first.train(first.fresh, steps)
    got, state = first.train(first.fresh, SAVED)
    share = -(-(steps - SAVED) // (len(way) - 1))
    for name in way[1:]:
        with tempfile.TemporaryDirectory() as path, contextlib.closing(Folder(path)) as folder:
            folder.save(state)
            state = folder.restore(trainer(name).fresh)
        more, state = trainer(name).train(state, min(share, steps - len(got)))
        got += more
    return worst_errors(got[SAVED:], expected[SAVED:])


def main() -> None:
    """Prints the largest difference of each optimizer on each way."""
    ways = [("8", other) for other in LAYOUTS if other != "8"]
    ways += [("no mesh", "8"), ("8", "4", "2", "1", "2x4", "8")]
    # Orbax saves no empty arrays.
    shapes = {name: shape for name, shape in SHAPES.items() if 0 not in shape}
    with jax.enable_x64(True):
        for name, make in ALL.items():
            trainer = functools.cache(functools.partial(Trainer, {name: make}, shapes))
            for way in ways:
                (error,) = moved(trainer, way, STEPS).values()
                print(f"{name}: {' -> '.join(way)}: {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
