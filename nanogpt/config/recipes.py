"""A recipe: what one optimizer's run has of its own. A published recipe: with what it reached."""

import dataclasses
from typing import Any, NamedTuple

from nanogpt.config.run import AuxiliaryConfig, CooldownConfig, Init, ScheduleConfig
from nanogpt.config.settings import MatrixConfig

NS12: dict[str, Any] = {"ns_steps": 12, "ns_coeffs": (2.0, -1.5, 0.5)}
# Coefficients of the medium track, one triple an iteration; Optax calls them "dion".
NS5_VARYING: dict[str, Any] = {
    "ns_steps": 5,
    "ns_coeffs": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
TOKENS = 524288  # of a batch: 2^19, so the scale of a sum is exact
AUXILIARY_OLD = AuxiliaryConfig(0.3, 1 / 320, 0.01)  # until #35
MEAN_EPS = 1e-10 * TOKENS  # where a script's loss is the mean: its eps on the scale of our sums
AUXILIARY_MEAN = dataclasses.replace(AUXILIARY_OLD, eps=MEAN_EPS)
AUXILIARY_TUNED = AuxiliaryConfig(0.7, 0.004, 0.015, weight_decay=0.001)  # since #36
AUXILIARY_ADAMW = dataclasses.replace(AUXILIARY_TUNED, weight_decay=0.002)  # pull request 353


class Recipe(NamedTuple):
    """What distinguishes one optimizer's run from another's."""

    optimizer: str
    matrices: MatrixConfig
    auxiliary: AuxiliaryConfig
    schedule: ScheduleConfig
    matrices_cooldown: CooldownConfig | None = None
    init: Init = "benchmark"


@dataclasses.dataclass(frozen=True)
class Published:
    """A recipe and what is known of it.

    Attributes:
        recipe: Settings, as published unless `note` says otherwise.
        source: Where they were published.
        expected_steps: Step whose validation loss is the result; the schedule may be longer.
        expected_loss: Mean validation loss there.
        expected_runs: Runs that the mean is of.
        inside_rules: Whether every step is one forward-backward pass, as the benchmark demands.
        same_model: Whether the published runs trained this model on these data.
        note: What is not as published, or not known.
    """

    recipe: Recipe
    source: str
    expected_steps: int | None = None
    expected_loss: float | None = None
    expected_runs: int | None = None
    inside_rules: bool = True
    same_model: bool = True
    note: str = ""
