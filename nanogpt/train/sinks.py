"""Where records of a run go: metrics.jsonl always, TensorBoard and Weights & Biases if asked for.

A sink of another kind is a class with the methods of `Sink`, named in `SINKS`.
"""

import importlib.util
from typing import Any, Protocol

import jax

from nanogpt.config.run import Config
from nanogpt.train.paths import is_remote
from nanogpt.train.run_folder import RunFolder

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Sink(Protocol):
    """Takes a run's records as they come; see docs/running.md for the kinds there are."""

    def write(self, kind: str, **fields: Any) -> None:
        """Takes a record; those of a step have the field "step"."""
        ...

    def close(self) -> None:
        """Brings everything to where it belongs."""
        ...


class TensorBoard:
    """Event files in the run's folder; records behind a checkpoint that is gone back to are hidden.

    Args:
        config: the run.
        resumed: updates done by earlier processes, None for a fresh run.
    """

    def __init__(self, config: Config, resumed: int | None):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(RunFolder(config).events), purge_step=resumed)

    def write(self, kind: str, **fields: Any) -> None:
        """Numbers of a step, as kind/name."""
        for name, value in _numbers(kind, fields).items():
            self._writer.add_scalar(name, value, fields["step"])

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, kept in the run's folder too; WANDB_MODE=offline sends nothing.

    A resumed run goes on with the id that its folder holds.

    Args:
        config: the run.
        resumed: updates done by earlier processes, None for a fresh run.
    """

    def __init__(self, config: Config, resumed: int | None):
        import wandb

        folder = RunFolder(config)
        known = folder.wandb.read_text() if resumed is not None and folder.wandb.is_file() else None
        own = None if is_remote(folder.path) else str(folder.path)  # None: where the command is
        self._run = wandb.init(
            project="nanogpt", name=config.name, id=known, resume="allow", dir=own
        )
        folder.wandb.write_text(self._run.id)

    def write(self, kind: str, **fields: Any) -> None:
        """Numbers of a step, as kind/name; settings and the like from the record "start"."""
        if kind == "start":
            self._run.config.update(fields, allow_val_change=True)
        elif numbers := _numbers(kind, fields):
            self._run.log(numbers | {"step": fields["step"]})

    def close(self) -> None:
        """Finishes the run."""
        self._run.finish()


SINKS = {"tensorboard": TensorBoard, "wandb": WandB}


def check_sinks(config: Config) -> None:
    """Refuses a sink whose package is not installed, or whose server does not take the run."""
    for name in config.output.sinks:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(
                f"output.sinks={name!r}: the package {PACKAGES[name]} is not installed: run "
                f"`pip install {PACKAGES[name]}`, or leave the sink out."
            )
    if "wandb" in config.output.sinks and jax.process_index() == 0:
        import wandb

        try:
            wandb.login(verify=True)
        except wandb.Error as error:
            raise ValueError(
                f"output.sinks='wandb': {error} Or set WANDB_MODE=offline, or leave the sink out."
            ) from error


def open_sinks(config: Config, resumed: int | None) -> list[Sink]:
    """Opens what the run names, in its folder; arguments as in `TensorBoard`."""
    return [SINKS[name](config, resumed) for name in config.output.sinks]


def _numbers(kind: str, fields: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record of a step by name; none of any other record."""
    found = {f"{kind}/{k}": v for k, v in fields.items() if isinstance(v, int | float)}
    found.pop(f"{kind}/step", None)
    return found if "step" in fields else {}
