"""A true training run on the carried text: loss, time per step, peak memory."""

import pathlib
import time
from typing import Any

import jax
import numpy as np

from nanogpt.train.provenance import peak_memory_bytes
from nanogpt.train.train_step import init_state, make_train_step
from scripts.maintenance.benchmarking.costs import compile_function
from scripts.maintenance.device import candidates
from scripts.maintenance.device.measure import on_gpu
from scripts.maintenance.device.records import Recorder
from scripts.maintenance.device.sizes import Sizes

TEXT = "text.npy"
# Losses are fetched, and times read, once for so many steps.
WINDOW = 10


def run(part: str, recorder: Recorder, sizes: Sizes, carried: pathlib.Path) -> None:
    """Trains one optimizer; every optimizer sees the same batches from the same weights."""
    text = read_text(carried, sizes)
    config, tx, words = candidates.training(part, sizes, bfloat16=on_gpu())
    recorder.add("run", optimizer=words, steps=sizes.steps, rows=sizes.train_rows, text=text.shape)
    graphdef, state = init_state(config, tx)
    step = make_train_step(graphdef, tx, config)
    compiled, costs = compile_function(step, state, _batch(text[0]), donate=(0,))
    recorder.add("compiled", **costs)
    losses: list[Any] = []
    window = min(WINDOW, sizes.steps)
    begin = time.perf_counter()
    for i in range(sizes.steps):
        state, metrics = compiled(state, _batch(text[i]))
        losses.append(metrics["loss"])
        if (i + 1) % window == 0:
            values = [float(loss) for loss in losses]
            now = time.perf_counter()
            recorder.add("window", step=i + 1, losses=values, step_s=(now - begin) / window)
            losses, begin = [], now
            if recorder.left() <= 0 and i + 1 < sizes.steps:
                error = f"the part's time was over after {i + 1} of {sizes.steps} steps"
                recorder.add("cut", name=part, error=error)
                break
    recorder.add("memory", peak_bytes=peak_memory_bytes())


def read_text(carried: pathlib.Path, sizes: Sizes) -> np.ndarray:
    """The first rows of every carried batch, `[steps, rows, length + 1]` ids.

    Raises:
        FileNotFoundError: no text was carried.
        ValueError: it is not enough.
    """
    path = carried / TEXT
    remedy = "make it with `python -m scripts.maintenance.device.prepare --text FOLDER`"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no text is carried; {remedy}.")
    text = np.load(path, mmap_mode="r")
    wanted = (sizes.steps, sizes.train_rows, sizes.length + 1)
    if any(have < want for have, want in zip(text.shape, wanted, strict=True)):
        raise ValueError(f"{path}: batches of shape {text.shape}, {wanted} are needed; {remedy}.")
    return text[tuple(slice(n) for n in wanted)]


def _batch(rows: np.ndarray) -> dict[str, jax.Array]:
    wide = np.asarray(rows, np.int32)
    return jax.device_put({"inputs": wide[:, :-1], "targets": wide[:, 1:]})
