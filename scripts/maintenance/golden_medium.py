"""Replays recordings of the medium track: its masks, loader, schedules, model, optimizers, runs.

Seven layouts, told by what they hold; sizes, token ids, windows, steps and rates are those of the
file. Parameters are recorded once, in a file of the layout of `model_fp32.npz`; the layouts of
`model_bf16.npz` and `train_e2e.npz` read the one beside them. Shards of a loader lie in the folder
`loader_shards` beside it. What a file says of the script that this code fixes (scale, eps, layers)
must be what is fixed, or the file is refused. Tolerances came with the recordings.

Not compared: the hidden matrices of AdamW in bfloat16, losses by rank, whose mean is, and whole
runs in bfloat16, for which no tolerance was given.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scripts.maintenance import (
    golden_medium_inputs,
    golden_medium_model,
    golden_medium_optimizers,
    golden_medium_runs,
)
from scripts.maintenance.parity.measurement import Measurement

Read = Callable[[Path, Mapping[str, np.ndarray]], Iterable[Measurement]]
# Of every layout an array that no other one has, and what compares it.
LAYOUTS: dict[str, Read] = {
    "param_exp": golden_medium_model.float32,
    "grad_dtypes": golden_medium_model.bfloat16,
    "ns_cases": golden_medium_optimizers.muon,
    "record_aux__eta": golden_medium_optimizers.adam,
    "train_positions": golden_medium_inputs.loader,
    "window_blocks": golden_medium_runs.trajectories,
}


def holds_medium(path: Path) -> bool:
    """Whether a file has one of these layouts."""
    if path.suffix == ".json":
        return "window_rule" in json.loads(path.read_text(encoding="utf-8"))
    with np.load(path) as z:
        return any(key in z for key in LAYOUTS) or _holds_masks(z)


def _holds_masks(z: Any) -> bool:
    return any(key.endswith("__first_key") for key in z)


def measurements(path: Path) -> list[Measurement]:
    """All comparisons of a file.

    Raises:
        ValueError: the file is not in the layout, says something that this code has otherwise, or
            the recording that it needs is not beside it.
    """
    if path.suffix == ".json":
        return list(golden_medium_inputs.schedules(json.loads(path.read_text(encoding="utf-8"))))
    with np.load(path) as z:
        data = dict(z)
    compare = next((f for key, f in LAYOUTS.items() if key in data), golden_medium_inputs.masks)
    return list(compare(path, data))


def error(path: Path) -> float:
    """The largest error over tolerance of a file; infinite where equality is missed."""
    found = measurements(path)
    if not found:
        raise ValueError("nothing to compare.")
    return max(map(ratio, found))


def ratio(m: Measurement) -> float:
    """Error over tolerance; where equality is asked for, 0 or infinite."""
    if not m.tolerance:
        return 0.0 if m.error == 0 else math.inf
    return float(np.nan_to_num(m.error / m.tolerance, nan=math.inf))
