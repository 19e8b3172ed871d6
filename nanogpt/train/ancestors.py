"""Runs that begin with another run: with its parameters, or with all that it did up to a step."""

import hashlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from nanogpt.config.run import Config
from nanogpt.optimizers.schedules import common_steps
from nanogpt.train.checkpoint import damage, plain, saved_steps
from nanogpt.train.digests import DamagedError
from nanogpt.train.elastic import reading
from nanogpt.train.metrics import read_start
from nanogpt.train.paths import Path, absolute, copy, path_of
from nanogpt.train.run_folder import RunFolder
from nanogpt.train.stored import expecting_form

_SIZES = ("vocab_size", "num_layers", "model_dim", "head_dim", "mlp_dim")
_MULTIPLIERS = ("width_multiplier", "depth_multiplier")  # which older runs have not


def read_params(config: Config, params: Any) -> tuple[Any, str]:
    """Loads the parameters of `config.init_from`'s newest checkpoint.

    Args:
        config: the run that begins with them.
        params: tree of arrays, the pattern for shapes, dtypes and placement.

    Returns:
        The parameters, and a digest of their values.

    Raises:
        ValueError: no such run, no checkpoint, or a model of other sizes.
    """
    folder, saved, steps = run_of("init_from", config.init_from)
    with expecting_form(folder / "metrics.jsonl"):
        sizes = {name: saved["model"][name] for name in _SIZES}
        sizes |= {name: saved["model"].get(name, 1.0) for name in _MULTIPLIERS}
    for name, before in sizes.items():
        now = getattr(config.model, name)
        if before != now:
            raise ValueError(
                f"init_from={config.init_from!r}: that run has model.{name}={before}, this one "
                f"{now}: set --model.{name.replace('_', '-')} {before}."
            )
    path = folder / "checkpoints" / str(max(steps))
    refuse_damaged("init_from", path)
    found = params_of(path, params)
    whole = jax.tree.leaves(multihost_utils.process_allgather(found, tiled=True))
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in whole))
    return found, digest.hexdigest()[:16]


def params_of(checkpoint: Path, params: Any) -> Any:
    """Loads the parameters of a checkpoint, and nothing else of it.

    Args:
        checkpoint: its folder.
        params: tree of arrays, or of their shapes with shardings, the pattern.

    Raises:
        DamagedError: arrays cannot be read.
    """
    pattern = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, params)}
    args = ocp.args.PyTreeRestore(
        item=pattern,
        restore_args=ocp.checkpoint_utils.construct_restore_args(pattern),
        partial_restore=True,
    )
    with ocp.PyTreeCheckpointer() as reader, reading(checkpoint / "state"):
        return reader.restore(absolute(checkpoint / "state"), args=args)["params"]


def common_checkpoint(config: Config) -> int:
    """Returns the newest checkpoint of `config.go_on_from` before its schedule is another one.

    Raises:
        ValueError: no such run, or no such checkpoint; names the step.
    """
    folder, saved, steps = run_of("go_on_from", config.go_on_from)
    with expecting_form(folder / "metrics.jsonl", ValueError):
        common = common_steps(saved, plain(config))
    usable = [step for step in steps if step <= common]
    if not usable:
        raise ValueError(
            f"go_on_from={config.go_on_from!r}: both schedules have the first {common} updates in "
            f"common, and a checkpoint of step {common} or before is missing: there are those of "
            f"{', '.join(map(str, steps))}. Train that run anew with --output.checkpoint-every and "
            "--output.keep-checkpoints, or begin with its parameters alone by --init-from."
        )
    refuse_damaged("go_on_from", path_of(config.go_on_from) / "checkpoints" / str(max(usable)))
    return max(usable)


def copy_run(config: Config, step: int) -> None:
    """Copies what `config.go_on_from` left up to a step into the run's own folder."""
    source, target = path_of(config.go_on_from), RunFolder(config)
    for file in [*source.glob("metrics*.jsonl"), *source.glob(target.record.name)]:
        (target.path / file.name).write_bytes(file.read_bytes())
    copy(source / "checkpoints" / str(step), target.checkpoints / str(step))


def refuse_damaged(name: str, folder: Path) -> None:
    """Refuses a checkpoint whose files are not what was saved."""
    if fault := damage(folder):
        raise DamagedError(f"{name}: {fault} Delete it there to take the one before.")


def run_of(name: str, folder: str) -> tuple[Path, dict[str, Any], list[int]]:
    """A run's folder, settings, and the steps of its checkpoints.

    Args:
        name: of the setting that names it.
        folder: here or in gs://.

    Raises:
        ValueError: it holds no run, or one without checkpoints.
    """
    path = path_of(folder)
    metrics = path / "metrics.jsonl"
    steps = saved_steps(path / "checkpoints")
    if not steps or not metrics.exists():
        raise ValueError(
            f"{name}={folder!r}: holds no run with checkpoints: give the folder that has "
            "metrics.jsonl and checkpoints/, as in runs/cpu/adamw."
        )
    return path, read_start(metrics)["config"], steps
