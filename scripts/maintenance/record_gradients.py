"""Records consecutive gradients of a few matrices while a small GPT trains.

    python -m scripts.maintenance.record_gradients

What an inverse root is worth depends on the spectra of the factors, and no synthetic spectrum is
quite like a network's. Gradients are stored in float16 with one scale a step: rounding to 11 bits
leaves noise far below a factor's default cutoff. The model of track 3 trains on the text of preset
cpu, which is at hand everywhere, with its vocabulary:

    python -m scripts.maintenance.record_gradients --preset track3 --rows 4 \
      --wanted 0:blocks/5/attn/q 0:blocks/5/mlp/fc:1024 0:blocks/5/attn/proj --out runs/track3.npz
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

# Before jax is imported: LAPACK's own threads make decompositions slower on few cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
import optax
import tyro

from nanogpt.config.presets import preset
from nanogpt.config.run import Config
from nanogpt.lab.preset_data import prepare_data
from nanogpt.optimizers.build import build_optimizer
from nanogpt.train.batches import open_data, to_device
from nanogpt.train.provenance import provenance
from nanogpt.train.train_step import abstract_params, init_state, make_train_step

# Beginning, middle and end of the preset's 300 steps. Early v and proj are nearly rank deficient,
# later v and fc have a quarter of their eigenvalues around the cutoff, q is well conditioned.
WANTED = (
    "5:blocks/1/attn/v",
    "5:blocks/3/attn/proj",
    "100:blocks/1/attn/v",
    "100:blocks/3/mlp/fc:256",
    "250:blocks/1/attn/v",
    "250:blocks/0/attn/q",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Records consecutive gradients of a few matrices while a small GPT trains."""

    out: pathlib.Path = pathlib.Path("runs/gradients.npz")  # file to write
    wanted: tuple[str, ...] = WANTED  # STEP:MATRIX, or STEP:MATRIX:COLUMNS for its first columns
    steps: int = 12  # consecutive gradients of each, from STEP on
    preset: Literal["cpu", "track3"] = "cpu"  # whose model and recipes
    optimizer: str = "adamw"  # recipe of the preset
    rows: int | None = None  # of a step's batch; None: as preset cpu


class Wanted(NamedTuple):
    """A matrix, and the step from which on its gradients are recorded."""

    step: int  # from 0
    matrix: str  # path without "/kernel"
    columns: int | None  # how many are kept; None for all

    @property
    def name(self) -> str:
        """Key of the recorded array."""
        return f"{self.step}:{self.matrix}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    given = sys.argv[1:] if arguments is None else arguments
    options = tyro.cli(
        Options,
        prog="python -m scripts.maintenance.record_gradients",
        description=__doc__,
        args=given,
    )
    config, small = preset(options.preset, options.optimizer), preset("cpu", "adamw")
    rows = options.rows or small.data.batch_rows
    data = dataclasses.replace(small.data, batch_rows=rows, microbatch_rows=rows)
    model = dataclasses.replace(config.model, vocab_size=small.model.vocab_size)
    config = dataclasses.replace(config, data=data, model=model)
    try:
        wanted = [parse(text) for text in options.wanted]
        prepare_data(config)
        recorded = record(config, wanted, options.steps)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    notes = {"command": " ".join(["python -m scripts.maintenance.record_gradients", *given])}
    write(options.out, recorded, notes | {"config": dataclasses.asdict(config)} | provenance())
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB")


def parse(text: str) -> Wanted:
    """Reads "STEP:MATRIX" or "STEP:MATRIX:COLUMNS".

    >>> parse("100:blocks/1/mlp/fc:256")
    Wanted(step=100, matrix='blocks/1/mlp/fc', columns=256)
    """
    step, _, rest = text.partition(":")
    matrix, _, columns = rest.partition(":")
    if not (step.isdigit() and matrix and (columns or "1").isdigit()):
        raise ValueError(f"wanted={text!r}: write STEP:MATRIX or STEP:MATRIX:COLUMNS.")
    return Wanted(int(step), matrix, int(columns) if columns else None)


def record(config: Config, wanted: Sequence[Wanted], steps: int) -> dict[str, np.ndarray]:
    """Trains and keeps the gradients that are asked for.

    Args:
        config: The run; it ends when the last gradient is recorded.
        wanted: Which matrices, from which step on.
        steps: How many consecutive gradients of each.

    Returns:
        {"STEP:MATRIX": float32 [steps, rows, columns]}, summed over the tokens of the batch.

    Raises:
        ValueError: A matrix that the model does not have, or steps beyond the run's last.
        ShardError: Bad shards.
    """
    params = abstract_params(config.model)
    paths = {f"{w.matrix}/kernel" for w in wanted}
    unknown = paths - set(_by_path(params))
    last = max(w.step for w in wanted) + steps
    if unknown:
        raise ValueError(f"wanted: the model has no matrix {sorted(unknown)[0]!r}.")
    if steps < 1 or last > config.schedule.steps:
        raise ValueError(
            f"steps={steps}: from 1 to what lies between the last step asked for, {last - steps}, "
            f"and the end of the run, {config.schedule.steps}."
        )
    keep = keep_gradients(lambda path: path in paths)
    tx = optax.chain(keep, build_optimizer(config, params))
    data = open_data(config)
    graphdef, state = init_state(config, tx)
    train_step = make_train_step(graphdef, tx, config)
    found: dict[str, list[np.ndarray]] = {w.name: [] for w in wanted}
    for step in range(last):
        state, _ = train_step(state, to_device(next(data.training)))
        for w in wanted:
            if w.step <= step < w.step + steps:
                gradient = state.opt_state[0][f"{w.matrix}/kernel"]
                found[w.name].append(np.asarray(gradient[:, : w.columns], np.float32))
    data.training.close()
    return {name: np.stack(gradients) for name, gradients in found.items()}


def keep_gradients(chosen: Any) -> optax.GradientTransformation:
    """Passes updates on and keeps the chosen ones in its state, {path: array}.

    Args:
        chosen: Function of a path "a/b/c" telling whether to keep it.

    Returns:
        Optax transformation.
    """

    def keep(tree: Any) -> dict[str, Any]:
        return {path: leaf for path, leaf in _by_path(tree).items() if chosen(path)}

    return optax.GradientTransformation(
        lambda params: optax.tree.zeros_like(keep(params)),
        lambda updates, state, params=None: (updates, keep(updates)),
    )


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def write(path: pathlib.Path, recorded: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> None:
    """Writes gradients as float16 with a float32 scale a step, and where they come from.

    Args:
        path: .npz file; its folder is made.
        recorded: {name: float32 [steps, rows, columns]}.
        notes: Anything that JSON can hold; stored as "notes".
    """
    arrays: dict[str, Any] = {"notes": np.array(json.dumps(notes))}
    for name, gradients in recorded.items():
        # 65504 is float16's largest number.
        scale = np.abs(gradients).max((1, 2), keepdims=True) / 60000
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        arrays[f"{name}|scale"] = scale
        arrays[f"{name}|values"] = (gradients / scale).astype(np.float16)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def read_gradients(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a file that `write` made.

    Returns:
        {name: float32 [steps, rows, columns]}.
    """
    with np.load(path) as file:
        names = [key.removesuffix("|scale") for key in file if key.endswith("|scale")]
        return {n: file[f"{n}|scale"] * file[f"{n}|values"].astype(np.float32) for n in names}


if __name__ == "__main__":
    main()
