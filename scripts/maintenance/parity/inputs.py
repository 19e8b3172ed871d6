"""Batches, schedule and validation steps against the script's; these are exact."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

import data_pipeline
from nanogpt.config.presets import preset
from nanogpt.config.run import ScheduleConfig
from nanogpt.optimizers.schedules import eta, learning_rate
from nanogpt.train.loop import validation_due
from scripts.maintenance.parity import golden
from scripts.maintenance.parity.measurement import Measurement, largest


def loader(rank: int, world: int) -> Iterator[Measurement]:
    """All batches of four shards that end at, before and after a whole batch.

    Args:
        rank: This process.
        world: Number of processes, 1 or 4.
    """
    folder = golden.RECORDED / "loader"
    with np.load(folder / "loader.npz") as z:
        expected = {key: z[f"w{world}_r{rank}_{key}"] for key in ("inputs", "targets")}
    iterator = data_pipeline.train_batches(
        sorted((folder / "shards").glob("*.bin")),
        sequence_length=64,
        batch_rows=16,
        mode="sequential",
        rank=rank,
        world=world,
    )
    try:
        batches = [dict(batch) for batch in iterator]
    finally:
        iterator.close()
    name = f"loader, rank {rank} of {world}"
    yield Measurement(name, "number of batches", abs(len(batches) - len(expected["inputs"])), 0)
    for key, tokens in expected.items():
        wrong = sum((b[key] != t).sum() for b, t in zip(batches, tokens, strict=False))
        yield Measurement(name, f"{key} that differ", float(wrong), 0)


def _table() -> dict[str, Any]:
    return json.loads((golden.RECORDED / "speedrun" / "schedule.json").read_text())


def _steps_and_values(table: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([int(s) for s in table]), np.array(list(table.values()))


def schedule() -> Iterator[Measurement]:
    """The multiplier of #36, counted from 0 at the first update, for lengths that divide or not."""
    name, table, errors = "schedule", _table(), {"float32": 0.0, "float64": 0.0}
    for steps, values in table["eta"].items():
        index, expected = _steps_and_values(values)
        config = ScheduleConfig(int(steps), cooldown=table["cooldown_frac"])
        for dtype in errors:
            with jax.enable_x64(dtype == "float64"):
                actual = np.asarray(eta(index, config))
            assert actual.dtype == dtype
            errors[dtype] = max(errors[dtype], largest(actual / expected, np.ones(len(index))))
    yield Measurement(name, "eta in float32, relative", errors["float32"], 1e-6)
    yield Measurement(name, "eta in float64, relative", errors["float64"], 1e-12)


def warmups() -> Iterator[Measurement]:
    """The warmups of pull request 353, from 1e-7 to each group's rate, and of #2, (s + 1) / 250."""
    name, table = "schedule", _table()
    tuned, first = table["warmup_tuned_adamw"], table["warmup_first_adamw"]
    warmup = {"warmup_steps": tuned["warmup_steps"], "warmup_from": tuned["start_lr"]}
    config, error = ScheduleConfig(tuned["K"], **warmup), 0.0
    for peak, rates in tuned["lr"].items():
        index, expected = _steps_and_values(rates)
        actual = np.asarray(learning_rate(float(peak), config)(index))
        error = max(error, largest(actual / expected, np.ones(len(index))))
    yield Measurement(name, "warmup of tuned AdamW, relative", error, 1e-6)
    index, expected = _steps_and_values(first["eta"])
    config = ScheduleConfig(first["K"], warmup_steps=first["warmup_steps"])
    error = largest(np.asarray(eta(index, config)) / expected, np.ones(len(index)))
    yield Measurement(name, "warmup of the first AdamW, relative", error, 1e-6)


def validation_steps() -> Iterator[Measurement]:
    """Which steps the benchmark validates at."""
    base, wrong = preset("track3", "muon_track3"), 0
    for steps, expected in _table()["val_steps"].items():
        schedule = dataclasses.replace(base.schedule, steps=int(steps))
        config = dataclasses.replace(base, schedule=schedule)
        due = {s for s in range(int(steps) + 1) if validation_due(s, config)}
        wrong += len(due ^ set(expected))
    yield Measurement("schedule", "validation steps that differ", wrong, 0)
