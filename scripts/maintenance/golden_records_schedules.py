"""Schedules of the benchmark's newer records, compared with the presets at every recorded step."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import shampoo_jax
from nanogpt.config.presets import PUBLISHED, preset
from nanogpt.config.run import Config
from nanogpt.config.settings import SoapMuonConfig
from nanogpt.optimizers import directions
from nanogpt.optimizers.schedules import learning_rate, lookahead_schedule, matrices_schedule

TOLERANCE = 1e-12  # relative
GROUP_SETTINGS = {
    "by_row": "row_floor",
    "length": "update_over_weight_floor",
    "outward": "radial_outward",
    "inward": "radial_inward",
    "ns_steps": "ns_steps",
    "moment_exponent": "soap_denominator_power",
    "exponent": "gamma",
    "every": "soap_frequency",
}


def schedules(run: Config) -> dict[str, Any]:
    """What a run's settings say of every step."""
    auxiliary, matrices = run.auxiliary, run.matrices
    found: dict[str, Any] = {
        name: learning_rate(getattr(auxiliary, f"{key}_learning_rate"), run.schedule)
        for name, key in (("embed", "embed"), ("head", "head"), ("vectors", "vector"))
    }
    found["matrices"] = learning_rate(matrices.learning_rate, matrices_schedule(run))
    found["lookahead"] = lambda step: np.zeros(np.shape(step))
    if run.lookahead is not None:
        found["lookahead"] = lookahead_schedule(run)
    found["mu"] = lambda step: np.full(np.shape(step), getattr(matrices, "b1", 0.0))
    if isinstance(matrices, SoapMuonConfig):
        limits = {"warmup": matrices.b1_warmup, "cooldown": matrices.b1_cooldown}
        found["mu"] = shampoo_jax.rise_and_fall(
            matrices.b1_low, matrices.b1, end=matrices.b1_end, **limits
        )
    return found


def schedules_error(path: Path) -> float:
    """The largest relative difference of what `schedules.json` has from the presets, over 1e-12.

    Raises:
      ValueError: It has a record that no preset is of.
    """
    records, worst = json.loads(path.read_text(encoding="utf-8"))["records"], 0.0
    by_source = {published.source: name for name, published in PUBLISHED.items()}
    with jax.enable_x64(True):
        for number, record in records.items():
            if f"#{number}" not in by_source:
                raise ValueError(f"records.{number}: no preset is of this result.")
            name = by_source[f"#{number}"]
            for ours, theirs in recorded_pairs(preset("track3", name), record):
                worst = max(worst, abs(ours - theirs) / max(abs(theirs), 1e-9))
            published, accepted = PUBLISHED[name], record["published"]["accepted"]
            if (published.expected_steps, published.expected_runs) != (
                accepted["step"],
                accepted["n"],
            ) or abs((published.expected_loss or 0) - accepted["mean"]) > 6e-6:
                return math.inf
    return worst / TOLERANCE


def recorded_pairs(run: Config, record: dict[str, Any]) -> Iterator[tuple[float, float]]:
    """Numbers of a run and of a record of `schedules.json` that have to be the same."""
    ours = schedules(run)
    names = {"embed": "embed", "head": "head", "one_d": "vectors"}
    extra = {"mu": "mu", "lookahead_alpha": "lookahead"}
    if isinstance(run.matrices, SoapMuonConfig):
        gates = directions.trust_schedules(run.matrices)
        ours |= dict(zip(("floor", "cap"), gates, strict=True))
        extra |= {"attn_proj_gate_floor": "floor", "attn_proj_gate_cap": "cap"}
    for step, values in record["values"].items():
        found = {names.get(key, "matrices"): value for key, value in values["lr"].items()}
        found |= {extra[key]: value for key, value in values.items() if key != "lr"}
        for key, value in found.items():
            yield float(ours[key](int(step))), value
    auxiliary, tail = run.auxiliary, record.get("tail_ema")
    for key, group in record["groups"].items():
        if "betas" in group:
            of = {"gains": 0, "attn_proj_bias": 1, "other_one_d": 2}
            own = auxiliary.vector_b2[of[key]] if key in of and auxiliary.vector_b2 else None
            yield auxiliary.b1, group["betas"][0]
            yield auxiliary.b2 if own is None else own, group["betas"][1]
            yield auxiliary.eps, group["eps"]
            yield auxiliary.weight_decay, group.get("weight_decay", 0)
        else:
            yield run.matrices.learning_rate, group["lr"]
            decay = group.get("cautious_weight_decay", group["weight_decay"])
            yield run.matrices.weight_decay, decay
            for ours_name, theirs in GROUP_SETTINGS.items():
                if theirs in group and hasattr(run.matrices, ours_name):
                    yield float(getattr(run.matrices, ours_name)), float(group[theirs])
    if tail is not None:
        assert run.tail is not None
        for ours_name, theirs in {"start": "start", "tau": "tau", "share": "blend"}.items():
            yield getattr(run.tail, ours_name), tail[theirs]
