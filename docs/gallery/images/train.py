"""Trains ResNet-50 on a folder of JPEGs: python -m docs.gallery.images.train --help.

    python -m docs.gallery.images.train --data data/imagenet --out runs/imagenet/shampoo
    python -m docs.gallery.images.train --data data/imagenet --optimizer sgd --out runs/imagenet/sgd

All devices of all processes share a batch. Started again with the same settings, a run goes on
from its last checkpoint; with others it refuses. `metrics.jsonl` gets a line after every epoch.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from docs.gallery.images.folder import Files, class_names, train_batches, val_batches
from docs.gallery.images.recipe import Settings, make_optimizer, scaled
from docs.gallery.images.training import (
    AXIS,
    State,
    abstract,
    initial,
    make_evaluation,
    make_step,
)
from nanogpt.train import distributed
from shampoo_jax import Placement


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run consists of.

    Attributes:
        settings: of the run.
        mesh: of all devices, one axis.
        steps: updates from the first to the last.
        epoch: updates from one evaluation to the next.
        abstract: shapes of the state, where they lie.
        first: gives the state before the first step, where it lies.
        step: the jitted step.
        evaluate: the jitted evaluation.
    """

    settings: Settings
    mesh: Mesh
    steps: int
    epoch: int
    abstract: State
    first: Any
    step: Any
    evaluate: Any


def network(settings: Settings) -> Any:
    """Shape of a run's network, with as many classes as its folder has."""
    return dataclasses.replace(settings.config, classes=len(class_names(settings.data)))


def make_run(settings: Settings, devices: Any = None) -> Run:
    """Looks at the folder and builds the programs; computes nothing.

    Args:
        settings: of the run.
        devices: for the mesh; None means all.

    Raises:
        ImageError: the folder cannot be used.
        ValueError: devices do not divide a batch.
    """
    devices = jax.devices() if devices is None else devices
    if settings.rows % len(devices):
        raise ValueError(
            f"rows={settings.rows} is not a multiple of the {len(devices)} devices: every device "
            "needs whole images."
        )
    config = network(settings)
    images = len(Files(settings.data, "train", class_names(settings.data)))
    steps = settings.steps(images)
    mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
    placement = Placement(mesh, AXIS) if len(devices) > 1 else None
    tx = make_optimizer(settings, steps, placement)
    state, shardings = abstract(config, tx, mesh)
    form: dict[str, Any] = {"dtype": settings.activations, "prepare": scaled}
    step = make_step(config, tx, smoothing=settings.label_smoothing, shardings=shardings, **form)
    epoch = max(1, min(steps, round(images / settings.rows)))
    first = jax.jit(lambda: initial(config, tx, settings.seed), out_shardings=shardings)
    return Run(settings, mesh, steps, epoch, state, first, step, make_evaluation(config, **form))


def on_devices(batch: Any, mesh: Mesh) -> Any:
    """This process's part of a batch as a part of the global one."""
    rows = NamedSharding(mesh, P(AXIS))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), dict(batch))


def evaluated(run: Run, state: State) -> dict[str, float]:
    """Mean loss and share of correct answers on all validation images."""
    settings, total = run.settings, np.zeros(3)
    batches = val_batches(
        settings.data, rows=settings.rows, size=settings.size, threads=settings.threads,
        rank=jax.process_index(), world=jax.process_count(),
    )  # fmt: skip
    for batch in batches:
        sums = run.evaluate(state.params, state.stats, on_devices(batch, run.mesh))
        total += np.asarray(sums)
    return {"val_loss": total[0] / total[2], "val_accuracy": total[1] / total[2]}


@contextlib.contextmanager
def checkpoints(run: Run) -> Iterator[ocp.CheckpointManager]:
    """Of the run; the settings that they belong to are written first, or compared.

    Raises:
        ValueError: the folder holds a run of other settings; names the first that differs.
    """
    settings = run.settings
    path, own = settings.out / "settings.json", _plain(settings)
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        for name, value in own.items():
            if there.get(name) != value:
                raise ValueError(
                    f"{settings.out} holds a run with {name}={there.get(name)!r}, not {value!r}: "
                    "choose another --out, or the same settings."
                )
    elif jax.process_index() == 0:
        settings.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(own, indent=1), encoding="utf-8")
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    folder = os.path.abspath(settings.out / "checkpoints")
    with ocp.CheckpointManager(folder, options=options) as manager:
        yield manager


def _plain(settings: Settings) -> dict[str, Any]:
    """What a run's results follow from; where it lies and reads, and how fast, may change."""
    fields = dataclasses.asdict(settings)
    return {k: v for k, v in fields.items() if k not in ("data", "out", "threads")}


def train(run: Run, until: int | None = None) -> dict[str, Any]:
    """Trains to the end, or goes on to it.

    Args:
        run: of `make_run`.
        until: step to stop at before, with a checkpoint.

    Returns:
        The last line of metrics.jsonl; empty where the first epoch is not over.
    """
    with checkpoints(run) as manager:
        at = manager.latest_step()
        there = ocp.args.StandardRestore(run.abstract)
        state: Any = run.first() if at is None else manager.restore(at, args=there)
        return _loop(run, manager, state, min(run.steps, until or run.steps))


def _loop(run: Run, manager: ocp.CheckpointManager, state: State, end: int) -> dict[str, Any]:
    settings, at = run.settings, int(state.step)
    data = train_batches(
        settings.data, rows=settings.rows, size=settings.size, seed=settings.seed,
        rank=jax.process_index(), world=jax.process_count(), threads=settings.threads,
    )  # fmt: skip
    grain.experimental.set_next_index(data, at)
    begin, counted, first = time.perf_counter(), 0, at
    while at < end:
        state, loss = run.step(state, on_devices(next(data), run.mesh))
        at, counted = at + 1, counted + 1
        if at == first + 1 < end:  # which compiled
            jax.block_until_ready(loss)
            begin, counted = time.perf_counter(), 0
        if at % run.epoch == 0 or at == run.steps:
            seconds = (jax.block_until_ready(loss), time.perf_counter() - begin)[1]
            record = {"step": at, "train_loss": float(loss), "step_s": seconds / counted}
            _write(settings.out, record | evaluated(run, state))
            begin, counted = time.perf_counter(), 0
        if at % settings.checkpoint_every == 0 or at == end:
            manager.save(at, args=ocp.args.StandardSave(state))
    return last_record(settings.out)


def _write(out: Path, record: dict[str, Any]) -> None:
    """Adds a line to metrics.jsonl, and says it."""
    if jax.process_index():
        return
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(out.name, json.dumps(record), flush=True)


def last_record(out: Path) -> dict[str, Any]:
    """The last line of a run's metrics; empty where there is none."""
    path = out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else {}


def main() -> None:
    """Runs the command line."""
    try:
        settings = tyro.cli(Settings, description=__doc__)
        distributed.start({})
        train(make_run(settings))
    except ValueError as error:  # of settings, or of the folder
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
