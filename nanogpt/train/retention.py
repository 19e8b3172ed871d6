"""Which checkpoints of a run are kept: Orbax's policies, and one of our own."""

import dataclasses
from collections.abc import Mapping, Sequence

import orbax.checkpoint as ocp

from nanogpt.config.run import Config
from nanogpt.optimizers.schedules import common_steps

policies = ocp.checkpoint_managers

LOSS = "validation_loss"  # a checkpoint's, among Orbax's metrics


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


def what_to_keep(config: Config) -> policies.PreservationPolicy:
    """The newest ones, the last one before the cooldown, and what the settings name beside them."""
    output = config.output
    kept: list[policies.PreservationPolicy] = [
        policies.LatestN(output.keep_checkpoints),
        LastBefore(cooldown_begin(config)),
        policies.BestN(
            get_metric_fn=validation_loss,
            reverse=True,
            n=output.keep_best,
            keep_checkpoints_without_metrics=False,
        ),
    ]
    if output.keep_every:
        kept.append(policies.EveryNSteps(output.keep_every))
    return policies.AnyPreservationPolicy(kept)


def validation_loss(metrics: Mapping[str, float]) -> float:
    """Of a checkpoint; infinite where none was measured."""
    return metrics[LOSS]


def cooldown_begin(config: Config) -> int:
    """Updates that a run has in common with a longer one; --go-on-from needs a checkpoint there."""
    longer = dataclasses.replace(config.schedule, steps=10 * config.schedule.steps)
    one, other = (
        dataclasses.asdict(dataclasses.replace(config, schedule=schedule))
        for schedule in (config.schedule, longer)
    )
    return common_steps(one, other)
