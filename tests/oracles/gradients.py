"""Gradients recorded from a real run, and what the float64 reference makes of them."""

import pathlib

import numpy as np

from scripts.maintenance.record_gradients import read_gradients

RECORDED = pathlib.Path(__file__).parents[1] / "golden" / "gradients" / "gpt_d128.npz"


def recorded_gradients() -> dict[str, np.ndarray]:
    """{"STEP:MATRIX": float32 [steps, rows, columns]}, consecutive gradients of one matrix each."""
    return read_gradients(RECORDED)
