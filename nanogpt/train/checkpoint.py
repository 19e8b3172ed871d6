"""Checkpoints of a run: training state, data position, and what they belong to (Orbax)."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from nanogpt.config.run import Config
from nanogpt.optimizers.schedules import common_steps
from nanogpt.train.batches import data_fingerprint
from shampoo_jax import FORMAT, state_layout

Meta = dict[str, Any]

# Settings that decide where things lie and how often they are shown, but no number of the run.
FREE_SETTINGS = (
    *("name", "output", "data.directory", "mesh", "scatter_gradients", "nonfinite_limit"),
    *("go_on_from", "profile"),
)


class Checkpoints:
    """Checkpoints in one folder, keyed by the number of updates done.

    Each holds `state` (any pytree of arrays), `data` (Grain's position) and `meta` (the full
    config, the data's fingerprint, seconds trained). The number of updates is stored once, in the
    state; the folder's name repeats it and is checked against it. Saves are asynchronous: `save`
    returns when the state has been copied, so the next step may overwrite it.

    Args:
        directory: made when it is first needed.
        config: the run's settings.
        fingerprint: identifies the data and their order.
    """

    def __init__(self, directory: pathlib.Path, config: Config, fingerprint: str):
        self.directory = directory
        self._config = config
        self._meta = {"config": plain(config), "data_fingerprint": fingerprint}
        self._resources = contextlib.ExitStack()

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._config.output.keep_checkpoints,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        manager = ocp.CheckpointManager(self.directory.absolute(), options=options)
        self._resources.callback(manager.close)
        return manager

    def latest(self) -> int | None:
        """Returns the newest checkpoint's number of updates, None if there is none."""
        self._manager.reload()  # one may have been copied here
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: grain.DatasetIterator, seconds: float) -> None:
        """Starts to save; Orbax leaves a step alone that is already there.

        Args:
            step: updates done; equals state.step.
            state: pytree of arrays.
            data: iterator that has handed out `step` batches.
            seconds: training time so far.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=grain.checkpoint.CheckpointSave(data),
                meta=ocp.args.JsonSave(
                    self._meta | {"train_time_s": seconds, "stored": _stored(state)}
                ),
            ),
        )

    def restore(self, step: int, state: Any, data: grain.DatasetIterator) -> tuple[Any, float]:
        """Loads a checkpoint after checking that it belongs to this config and these data.

        Schedules may differ where they have the updates up to this one in common: the run goes on
        as if the new one had been its own from the beginning.

        Args:
            step: one of the saved steps.
            state: pytree of arrays, the pattern for shapes, dtypes and placement.
            data: iterator, moved to the saved position.

        Returns:
            The saved state, placed like `state`, and the seconds trained so far.

        Raises:
            ValueError: config or data differ; names the first setting that does.
        """
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        self._check(meta["meta"], state, step)
        pattern = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(pattern),
                data=grain.checkpoint.CheckpointRestore(data),
            ),
        )
        if int(restored["state"].step) != step:
            raise ValueError(
                f"checkpoint {self.directory / str(step)} holds a state of step "
                f"{int(restored['state'].step)}: the folder was renamed; rename it back."
            )
        return restored["state"], float(meta["meta"]["train_time_s"])

    def check_start(self, record: Meta, identity: Mapping[str, Any]) -> None:
        """Refuses to replace the records of another run, where they are all that is left of it.

        Args:
            record: the first one, "start".
            identity: what this run's losses are about, see `nanogpt.train.batches.RunData`.

        Raises:
            ValueError: config or data differ.
        """
        self._check_config(record["config"])
        told = record.get("fingerprint") or identity
        self._check_data(all(told[name] == identity[name] for name in ("data", "validation")))

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes pending saves and frees the manager's threads."""
        self._resources.close()

    def _check(self, saved: Meta, state: Any, step: int) -> None:
        before, now, data = saved["config"], self._meta["config"], self._meta["data_fingerprint"]
        if common_steps(before, now) >= step:
            if (steps := before["schedule"]["steps"]) != now["schedule"]["steps"]:
                schedule = dataclasses.replace(self._config.schedule, steps=steps)
                data = data_fingerprint(dataclasses.replace(self._config, schedule=schedule))
            before = before | {name: now[name] for name in ("schedule", "matrices_cooldown")}
        self._check_config(before)
        self._check_data(saved["data_fingerprint"] == data)
        if saved["stored"] != _stored(state):
            raise ValueError(
                f"cannot resume from {self.directory} with mesh={self._meta['config']['mesh']!r}: "
                f"it was saved with mesh={saved['config']['mesh']!r}, and stacks of blocks are "
                "padded to the number of devices. Resume on as many devices."
            )

    def _check_config(self, saved: Meta) -> None:
        """Refuses to go on with a run of another optimizer or other settings, by name."""
        now = self._meta["config"]
        if saved["optimizer"] != now["optimizer"]:
            # It has its own recipe: the first setting that differs would be named in its place.
            raise ValueError(
                f"cannot resume from {self.directory}: optimizer={saved['optimizer']!r} trained "
                f"it, this run has optimizer={now['optimizer']!r}. Name that one by --optimizer, "
                "or begin with its parameters under another name: --init-from its folder."
            )
        difference = first_difference(saved, now)
        if difference is not None:
            name, before, now = difference
            raise ValueError(
                f"cannot resume from {self.directory}: it was saved with {name}={before!r}, this "
                f"run has {name}={now!r}. Set {name} back, or start a new run under another name; "
                "--go-on-from takes another schedule from where both are still the same."
            )

    def _check_data(self, same: bool) -> None:
        if not same:
            raise ValueError(
                f"cannot resume from {self.directory}: the shards in data.directory="
                f"{self._config.data.directory!r} are not those of the saved run. "
                "Point data.directory at them, or start a new run under another name."
            )


def first_difference(before: Meta, now: Meta, prefix: str = "") -> tuple[str, Any, Any] | None:
    """Returns (dotted name, before, now) of the first setting that differs, None if none does.

    `FREE_SETTINGS` may differ.

    >>> first_difference({"seed": 0, "data": {"mode": "a"}}, {"seed": 0, "data": {"mode": "b"}})
    ('data.mode', 'a', 'b')
    """
    for key in before | now:
        name, left, right = prefix + key, before.get(key), now.get(key)
        if name in FREE_SETTINGS or left == right:
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            deeper = first_difference(left, right, name + ".")
            if deeper is not None:
                return deeper
            continue
        return name, left, right
    return None


def _stored(state: Any) -> Meta:
    """What depends on the number of devices and on the version: shapes, stacks, their format."""
    shapes = [list(leaf.shape) for leaf in jax.tree.leaves(state)]
    return {"shapes": shapes, "stacks": state_layout(state), "format": FORMAT}


def plain(config: Config) -> Meta:
    """Returns the config as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
