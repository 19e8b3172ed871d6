"""Which checkpoints of a run are kept: Orbax's policies, and one of our own."""

import dataclasses
from collections.abc import Mapping, Sequence

import orbax.checkpoint as ocp

from nanogpt.config.run import Config
from nanogpt.optimizers.schedules import common_steps
from nanogpt.train.compatible import read_meta
from nanogpt.train.digests import DamagedError
from nanogpt.train.paths import Path

policies = ocp.checkpoint_managers

LOSS = "validation_loss"  # a checkpoint's, in what is stored beside its state


@dataclasses.dataclass(frozen=True)
class LastBefore:
    """Keeps the newest checkpoint up to a step.

    Attributes:
        step: updates.
    """

    step: int

    def should_preserve(
        self,
        checkpoints: Sequence[policies.PolicyCheckpointInfo],
        *,
        context: policies.PreservationContext,
    ) -> Sequence[bool]:
        """Orbax's question, for checkpoints in the order of their steps."""
        last = max((one.step for one in checkpoints if one.step <= self.step), default=None)
        return [one.step == last for one in checkpoints]


@dataclasses.dataclass(frozen=True)
class LowestLoss:
    """Keeps the checkpoints of the lowest validation losses, of equal ones the first.

    Orbax's own policy has Orbax read the losses of all checkpoints, and one of them that is damaged
    ends the run.

    Attributes:
        losses: by step, of the checkpoints that have one; may grow.
        count: how many.
    """

    losses: Mapping[int, float]
    count: int

    def should_preserve(
        self,
        checkpoints: Sequence[policies.PolicyCheckpointInfo],
        *,
        context: policies.PreservationContext,
    ) -> Sequence[bool]:
        """Orbax's question, for checkpoints in the order of their steps."""
        known = [one.step for one in checkpoints if one.step in self.losses]
        best = sorted(known, key=lambda step: self.losses[step])[: self.count]
        return [one.step in best for one in checkpoints]


def saved_losses(folders: Sequence[Path]) -> dict[int, float]:
    """Validation losses of checkpoints by step; those that cannot be read have none."""
    found = {}
    for folder in folders:
        try:
            loss = read_meta(folder).get(LOSS)
        except DamagedError:
            continue
        if isinstance(loss, float):
            found[int(folder.name)] = loss
    return found


def what_to_keep(config: Config, losses: Mapping[int, float]) -> policies.PreservationPolicy:
    """The newest ones, the last one before the cooldown, and what the settings name beside them.

    Args:
        config: the run.
        losses: by step, see `LowestLoss`.
    """
    output = config.output
    kept: list[policies.PreservationPolicy] = [
        policies.LatestN(output.keep_checkpoints),
        LastBefore(cooldown_begin(config)),
        LowestLoss(losses, output.keep_best),
    ]
    if output.keep_every:
        kept.append(policies.EveryNSteps(output.keep_every))
    return policies.AnyPreservationPolicy(kept)


def cooldown_begin(config: Config) -> int:
    """Updates that a run has in common with a longer one; --go-on-from needs a checkpoint there."""
    longer = dataclasses.replace(config.schedule, steps=10 * config.schedule.steps)
    one, other = (
        dataclasses.asdict(dataclasses.replace(config, schedule=schedule))
        for schedule in (config.schedule, longer)
    )
    return common_steps(one, other)
