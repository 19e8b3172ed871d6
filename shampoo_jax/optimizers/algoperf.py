"""The five settings of Shampoo that won AlgoPerf's external tuning, as published."""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from shampoo_jax.base.options import WholeNumber, refuse
from shampoo_jax.blocks.blocking import Blocking
from shampoo_jax.optimizers.momentum import momentum
from shampoo_jax.parts.grafting import scale_by_second_moment
from shampoo_jax.solvers.eigh import ShiftedEigh

EVERY, BLOCK, EPS = 100, 1024, 1e-8  # of all five: `precondition_frequency` and so on
LARGEST = 1_000_000  # edge from which a table is left to Adam


class AlgoPerfTrial(NamedTuple):
    """One of the five, in the names and to the digits of `tuning_search_space.json`.

    Attributes:
      learning_rate: Peak of the schedule.
      one_minus_beta1: Of the filtered gradient.
      one_minus_beta2: Of factors and graft.
      one_minus_momentum: Of the momentum behind the direction; None where there is none.
      weight_decay: Decoupled.
      inv_root_override: Root of every factor, 2 for exponent 1/2; 0 for Shampoo's own.
      grafting_type: `"ADAM"` or `"SGD"`.
      warmup_factor: Share of the steps in which the rate rises.
      label_smoothing: Of the loss; the caller's affair, as is
      dropout_rate: Of the model.
      use_nadam: Whether the filtered gradient looks one step ahead.
      step_hint_factor: Steps as a share of the workload's hint.
    """

    learning_rate: float
    one_minus_beta1: float
    one_minus_beta2: float
    one_minus_momentum: float | None
    weight_decay: float
    inv_root_override: int
    grafting_type: str
    warmup_factor: float
    label_smoothing: float
    dropout_rate: float
    use_nadam: bool
    step_hint_factor: float


ALGOPERF = (
    AlgoPerfTrial(
        *(0.0017486387539278373, 0.06733926164, 0.00448403102, None, 0.08121616522670176),
        *(0, "ADAM", 0.02, 0.0, 0.1, True, 1.0),
    ),
    AlgoPerfTrial(
        *(0.0014381744028656841, 0.025337537053408913, 0.02508024059481679, None),
        *(0.00019716633625688372, 0, "ADAM", 0.05, 0.2, 0.0, True, 0.6),
    ),
    AlgoPerfTrial(
        *(4.199449275251465, 1.0, 0.0023701743773090066, 0.03150207249544311),
        *(6.404237434173623e-05, 0, "SGD", 0.02, 0.1, 0.0, False, 1.0),
    ),
    AlgoPerfTrial(
        *(0.0012, 0.016610699316537858, 0.005888216674053163, 0.5, 0.00040349948255455174),
        *(2, "ADAM", 0.02, 0.1, 0.1, True, 1.0),
    ),
    AlgoPerfTrial(
        *(0.001308209823469072, 0.02686663061, 0.00187670778, None, 0.16375311233774334),
        *(0, "ADAM", 0.1, 0.1, 0.0, True, 1.0),
    ),
)


def algoperf(trial: int, steps: int) -> dict[str, Any]:
    """Options of `shampoo` for one of the five settings that won AlgoPerf's external tuning.

    Linear warmup, then half a cosine to zero. Roots every 100 steps, from step 100 on, of blocks of
    1,024 read as Meta's package does; every parameter is preconditioned but tables with a million
    rows and more. Momentum, in trials 3 and 4, is a moving average with Nesterov's look ahead.
    Result there, on eight GPUs of 16 GB with all five tried on every workload: first place of the
    benchmark's first round (v0.5, 2024). Not run with this package. Source: mlcommons
    submissions_algorithms, previous_leaderboards/algoperf_v05/submissions/external_tuning/
    shampoo_submission.

    Two differences: the filtered gradient of NAdam is divided here by the sum of its weights, there
    by `1 - b1^t`, which is larger by `(1 - b1^(t+1)) / (1 - b1^t)` and the same after warmup; and
    large tables get AdamW, without NAdam's look ahead and without momentum, at the same rate: trial
    3's is SGD's, 4.2, so a model with such a table needs `others=` of its own there.

    Args:
      trial: 1 to 5; `ALGOPERF[trial - 1]` has its numbers, label smoothing and dropout too.
      steps: The workload's step hint; trial 2 ends its schedule at 0.6 of it. 186,666 there for
        ImageNet.

    Raises:
      ValueError: Another trial, or steps that are no positive whole number.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.shampoo(**shampoo_jax.presets.algoperf(1, steps=1000))
      >>> shampoo_jax.presets.ALGOPERF[0].dropout_rate
      0.1
    """
    if trial not in range(1, len(ALGOPERF) + 1):
        refuse("trial", trial, ": choose 1 to 5")
    WholeNumber("the workload's step hint, 186_666 say")("steps", steps)
    about = ALGOPERF[trial - 1]
    rate = _schedule(about, steps)
    b1, b2 = 1 - about.one_minus_beta1, 1 - about.one_minus_beta2
    left = about.one_minus_momentum
    return dict(
        learning_rate=rate,
        b1=b1,
        b2=b2,
        b3=b1 * b1 if about.use_nadam else None,
        blocking=Blocking(BLOCK, merge=1, canonical=False, dimension_numbers=None),
        exponents=1 / about.inv_root_override if about.inv_root_override else None,
        solver=ShiftedEigh(EPS),
        every=EVERY,
        graft="sgd" if about.grafting_type == "SGD" else scale_by_second_moment(b2, EPS),
        weight_decay=about.weight_decay,
        momentum=None if left is None else momentum(1 - left, dampening=1 - left, nesterov=True),
        preconditioned=_no_large_table,
        others=optax.adamw(rate, b1, b2, EPS, weight_decay=about.weight_decay),
    )


def _schedule(about: AlgoPerfTrial, steps: int) -> optax.Schedule:
    whole = about.step_hint_factor * steps
    warmup = int(about.warmup_factor * whole)
    rise = optax.linear_schedule(0.0, about.learning_rate, warmup)
    fall = optax.cosine_decay_schedule(about.learning_rate, max(whole - warmup, 1))  # type: ignore
    return optax.join_schedules([rise, fall], [warmup]) if warmup else fall


def _no_large_table(path: tuple[Any, ...], leaf: jax.Array) -> bool:
    """Whether every edge is below a million."""
    del path
    return all(d < LARGEST for d in np.shape(leaf))
