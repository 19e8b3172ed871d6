"""Checkpoints of a run: training state, data position, and what they belong to (Orbax)."""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from nanogpt.config.run import Config
from nanogpt.optimizers.schedules import common_steps
from nanogpt.train.batches import data_fingerprint, go_to
from nanogpt.train.compatible import (
    FREE_SETTINGS,
    PIECES,
    Meta,
    first_difference,
    layout_difference,
    layout_of,
    read_meta,
    tuned,
)
from nanogpt.train.digests import DamagedError, check_digests, write_digests
from nanogpt.train.distributed import largest_of_all
from nanogpt.train.elastic import read_state
from nanogpt.train.metrics import read_start
from nanogpt.train.paths import COMMITTED, Path, absolute, is_remote, move
from nanogpt.train.retention import LOSS, saved_losses, what_to_keep
from nanogpt.train.stored import expecting_form


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

    def __init__(self, directory: Path, config: Config, fingerprint: str):
        self.directory = directory
        self._config = config
        self._meta = {"config": plain(config), "data_fingerprint": fingerprint}
        self._resources = contextlib.ExitStack()
        self._step = 0  # of the save under way
        self._losses: dict[int, float] = {}  # of validations, by step, where the best are kept

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        if self._config.output.keep_best:
            steps = saved_steps(self.directory)
            self._losses |= saved_losses([self.directory / str(step) for step in steps])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=what_to_keep(self._config, self._losses),
            # What Orbax reads of all checkpoints is not needed, and may be damaged.
            lightweight_initialize=True,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._digest),
        )
        manager = ocp.CheckpointManager(absolute(self.directory), options=options)
        self._resources.callback(manager.close)
        return manager

    def open(self, state: Any) -> None:
        """Makes the folder, and whatever else saves of such a state need."""
        self._manager.all_steps()
        self._meta["stored"] = layout_of(state)

    def newest(self, *, go_back: bool = False) -> tuple[int | None, list[str]]:
        """Returns the newest checkpoint's number of updates, after a look at its digests.

        With several processes all of them have to ask, and get the same answer.

        Args:
            go_back: pass over those that are damaged, to the newest one that is sound.

        Returns:
            The number, None if there is no checkpoint; and what is wrong with those passed over.

        Raises:
            DamagedError: the newest one is damaged, or all are; names the file.
        """
        damaged: list[str] = []
        steps = saved_steps(self.directory)
        for step in reversed(steps):
            folder = self.directory / str(step)
            fault = damage(folder)
            if os.path.islink(folder):  # Orbax deletes none
                fault = f"checkpoint {folder} is a link: put there what it leads to."
            if not fault:
                return step, damaged
            if not go_back:
                raise DamagedError(
                    f"{fault} --resume=previous-good goes back to the newest one that is sound."
                )
            damaged.append(fault)
        if damaged:
            raise DamagedError(
                f"{damaged[0]} None of {len(damaged)} checkpoints is sound: start anew with "
                "--overwrite or another --name."
            )
        return None, damaged

    def save(
        self, step: int, state: Any, data: grain.DatasetIterator, seconds: float,
        loss: float = math.inf,
    ) -> None:  # fmt: skip
        """Starts to save; Orbax leaves a step alone that is already there.

        Args:
            step: updates done; equals state.step.
            state: pytree of arrays.
            data: iterator that has handed out `step` batches.
            seconds: training time so far.
            loss: of the validation before the next update; infinite if there was none.
        """
        if "stored" not in self._meta:
            self.open(state)
        self.wait()  # for the save before: `_digest` asks for the step
        self._step, manager, meta = step, self._manager, {"train_time_s": seconds}
        if math.isfinite(loss):
            self._losses[step] = meta[LOSS] = float(loss)
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=grain.checkpoint.CheckpointSave(data),
                meta=ocp.args.JsonSave(self._meta | meta),
            ),
        )

    def _digest(self) -> None:
        """Orbax calls this in the first process, when all have written and nothing is renamed."""
        if is_remote(self.directory):
            write_digests(self.directory / str(self._step))
        for folder in self.directory.glob(f"{self._step}.*"):
            write_digests(folder)

    def restore(self, step: int, state: Any, data: grain.DatasetIterator) -> tuple[Any, float]:
        """Loads a checkpoint after checking that it belongs to this config and these data.

        Schedules may differ where they have the updates up to this one in common: the run goes on
        as if the new one had been its own from the beginning. So may the devices, and their number.

        Args:
            step: one of the saved steps.
            state: pytree of arrays, the pattern for shapes, dtypes and placement.
            data: iterator, moved to the saved position.

        Returns:
            The saved state, placed like `state`, and the seconds trained so far.

        Raises:
            ValueError: config or data differ; names the first setting that does.
        """
        folder = absolute(self.directory) / str(step)
        meta = self.check(folder, state)
        with expecting_form(folder, ValueError):
            seconds = float(meta["train_time_s"])
        restored = read_state(folder / "state", state, meta["stored"])
        if int(restored.step) != step:
            raise ValueError(
                f"checkpoint {self.directory / str(step)} holds a state of step "
                f"{int(restored.step)}: the folder was renamed; rename it back."
            )
        go_to(data, step, folder / "data")
        return restored, seconds

    def set_aside(self, step: int | None) -> None:
        """Moves the checkpoints behind a step out of the way; nothing may be saved meanwhile."""
        for later in saved_steps(self.directory):
            if step is not None and later > step:
                target = self.directory.with_name("damaged") / str(later)
                move(self.directory / str(later), target)

    def check_start(self, metrics: Path, identity: Mapping[str, Any]) -> None:
        """Refuses to replace the records of another run, where they are all that is left of it.

        Args:
            metrics: file of the records.
            identity: what this run's losses are about, see `nanogpt.train.batches.RunData`.

        Raises:
            ValueError: config or data differ.
        """
        record = read_start(metrics)
        with expecting_form(metrics):
            self._check_config(record["config"])
            told = record.get("fingerprint") or identity
            self._check_data(all(told[name] == identity[name] for name in ("data", "validation")))

    def wait(self) -> None:
        """Returns when everything saved is on disk.

        Raises:
            OSError: the disk is full, or hangs; of what was not written, nothing counts.
        """
        with _telling(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes pending saves and frees the manager's threads; errors as in `wait`."""
        with _telling(self.directory):
            self._resources.close()

    def check(self, folder: Path, state: Any) -> Meta:
        """Refuses a checkpoint that this run, or one that goes on from it, cannot have made.

        Args:
            folder: of the checkpoint, named after its step.
            state: a fresh one.

        Returns:
            What was stored beside the state.

        Raises:
            ValueError: config, data or the state's layout differ; names what does first.
        """
        saved = read_meta(folder)
        with expecting_form(folder, ValueError):
            common = common_steps(saved["config"], self._meta["config"])
        with expecting_form(folder):
            self._check_saved(saved, common >= int(folder.name))
            difference = layout_difference(saved["stored"], layout_of(state))
        if difference:
            raise ValueError(
                f"cannot resume from {folder}: {difference}. Go back to what it was saved with, "
                "or begin with its parameters alone by --init-from."
            )
        return saved

    def _check_saved(self, saved: Meta, alike: bool) -> None:
        """Refuses config and data that differ from this run's, but for what may.

        Args:
            saved: beside the state.
            alike: whether the schedules were the same until then.
        """
        before, now, data = saved["config"], self._meta["config"], self._meta["data_fingerprint"]
        if alike:
            if (steps := before["schedule"]["steps"]) != now["schedule"]["steps"]:
                schedule = dataclasses.replace(self._config.schedule, steps=steps)
                data = data_fingerprint(dataclasses.replace(self._config, schedule=schedule))
            before = before | {name: now[name] for name in ("schedule", "matrices_cooldown")}
        if now["go_on_from"] and now["go_on_from"] != before["go_on_from"]:
            before = tuned(before, now)  # another run's; what this one saves itself has its own
        self._check_config(before)
        self._check_data(saved["data_fingerprint"] == data)

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
        pieces = () if self._config.matrices.reads_microbatches else (PIECES,)
        difference = first_difference(saved, now, FREE_SETTINGS + pieces)
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


def plain(config: Config) -> Meta:
    """Returns the config as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


@contextlib.contextmanager
def _telling(directory: Path) -> Iterator[None]:
    """Errors of a save in a sentence: TensorStore's for a full disk is one of many lines."""
    try:
        yield
    except TimeoutError as error:  # Orbax measures by the clock of the day
        raise TimeoutError(
            f"{directory}: a checkpoint was not written in time: the disk hangs, or the "
            "clock was set forward. Go on with --resume from the one before."
        ) from error
    except Exception as error:
        reason = os.strerror(errno.ENOSPC)
        if reason not in str(error):
            raise
        raise OSError(errno.ENOSPC, reason, str(directory)) from error


def saved_steps(directory: Path) -> list[int]:
    """Numbers of the checkpoints in a folder, in their order; those half written have none."""
    found = [path for path in directory.glob("*") if re.fullmatch("0|[1-9][0-9]*", path.name)]
    if is_remote(directory):  # what cannot be renamed has its number from the beginning
        found = [path for path in found if (path / COMMITTED).exists()]
    return sorted(int(path.name) for path in found)


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, empty if nothing; each process reads its part of it."""
    fault = ""
    try:
        check_digests(folder, (jax.process_index(), jax.process_count()))
    except DamagedError as error:
        fault = str(error)
    if jax.process_count() > 1 and largest_of_all(bool(fault)) and not fault:
        return f"checkpoint {folder} is damaged: another process of the job says where."
    return fault
