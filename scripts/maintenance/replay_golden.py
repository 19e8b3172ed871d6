"""Replays recorded optimizer trajectories and reports the worst error over tolerance per file.

    python -m scripts.maintenance.replay_golden tests/golden/meta/*.npz

A file holds a config in JSON, initial parameters, gradients, the reference's parameters after every
step and `spread`, how far rounding alone moves the reference. A parameter agrees if its error is
within `4 * spread + 1e-6` (float32) or `4 * spread + 1e-11` (float64). Files of matrix functions
are compared as `scripts.maintenance.golden_matrix` says, optimizers that follow a width as
`scripts.maintenance.golden_transfer` does, those with statistics of microbatches, which hold
several modes, as `scripts.maintenance.golden_microbatches` does, entries of the benchmark's newer
records as `scripts.maintenance.golden_records` does, multipliers in JSON as
`scripts.maintenance.golden_multipliers` does, the medium track's model, data and runs as
`scripts.maintenance.golden_medium` does. Exits 1 on a miss or where a file
is refused: nothing that a file says is ignored, see `scripts.maintenance.golden_format`.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shampoo_jax
from scripts.maintenance import (
    golden_adapter,
    golden_matrix,
    golden_medium,
    golden_microbatches,
    golden_multipliers,
    golden_records,
    golden_transfer,
)

TOLERANCE = {"float32": 1e-6, "float64": 1e-11}
TABLE = """# Agreement with recorded data of Meta's `distributed_shampoo`

The largest error over tolerance of every file, all steps and parameters; at most 1 is agreement.
The tolerance is `4 * spread + 1e-6` in float32 and `4 * spread + 1e-11` in float64, where `spread`
is how far rounding alone moves the reference; 2e-12 of the largest entry for matrix functions.
`python -m scripts.maintenance.replay_golden tests/golden/meta/*.npz --table docs/golden.md` wrote
this table with {versions}.

| file | error / tolerance |
| --- | ---: |
{rows}
"""


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One recorded file."""

    name: str
    config: dict[str, Any]
    params: dict[str, np.ndarray]
    gradients: list[dict[str, np.ndarray | None]]
    expected: list[dict[str, np.ndarray]]
    spread: list[dict[str, float]]
    learning_rates: np.ndarray
    evaluated: dict[str, np.ndarray]
    evaluated_spread: dict[str, float]

    @property
    def dtype(self) -> str:
        """Precision of the run, `"float32"` or `"float64"`."""
        return self.config["dtype"]


def load(path: Path) -> Trajectory:
    """Reads a trajectory file.

    Args:
      path: npz file as described in the module's docstring.

    Returns:
      The trajectory; gradients that were missing are None.

    Raises:
      ValueError: an array is missing or has another shape than its parameter and the steps give.
    """
    with np.load(path) as z:
        names = json.loads(str(z["names"]))
        _check_arrays(z, names)
        present = z["grad_present"]
        steps = range(len(z["lr"]))
        return Trajectory(
            name=path.stem,
            config=json.loads(str(z["config"])),
            params={n: z[f"init__{n}"] for n in names},
            gradients=[
                {n: z[f"grad__{n}"][t] if present[t, i] else None for i, n in enumerate(names)}
                for t in steps
            ],
            expected=[{n: z[f"param__{n}"][t] for n in names} for t in steps],
            spread=[{n: float(z[f"spread__{n}"][t]) for n in names} for t in steps],
            learning_rates=z["lr"],
            evaluated={n: z[f"eval__{n}"] for n in names if f"eval__{n}" in z},
            evaluated_spread={n: float(z[f"eval_spread__{n}"]) for n in names if f"eval__{n}" in z},
        )


def _check_arrays(z: Any, names: list[str]) -> None:
    """Refuses arrays that do not belong together, and files that compare nothing."""
    steps = len(z["lr"])
    if not steps or not names:
        raise ValueError(f"lr has {steps} steps and names={names}: nothing to compare.")
    shapes = {"grad_present": (steps, len(names))}
    for n in names:
        shape = z[f"init__{n}"].shape
        shapes |= {f"grad__{n}": (steps, *shape), f"param__{n}": (steps, *shape)}
        shapes |= {f"spread__{n}": (steps,)}
        if f"eval__{n}" in z:
            shapes |= {f"eval__{n}": shape, f"eval_spread__{n}": ()}
    for key, shape in shapes.items():
        if z[key].shape != shape:
            raise ValueError(f"{key} has shape {z[key].shape}: it must be {shape}.")
        if "spread" in key and not np.isfinite(z[key]).all():
            raise ValueError(f"{key}={z[key]} is not finite: every error would pass.")


def replay(
    trajectory: Trajectory,
    make: Callable[[dict[str, Any]], optax.GradientTransformation] = golden_adapter.optimizer,
    archive: Mapping[str, np.ndarray] | None = None,
) -> float:
    """Runs a trajectory and returns the worst error as a multiple of the tolerance.

    Args:
      trajectory: What was recorded.
      make: Builds the optimizer; another one in tests that want to see a miss.
      archive: The reference's state and parameters after some of the steps: the others are ours.

    Returns:
      The largest error over tolerance over all steps and parameters; at most 1 is agreement.
    """
    # enable_x64 is a context so that one process can replay files of both precisions.
    with jax.enable_x64(trajectory.config.get("dtype") == "float64"):
        tx = make({**trajectory.config, "learning_rates": trajectory.learning_rates})
        params = {n: jnp.asarray(p, trajectory.dtype) for n, p in trajectory.params.items()}
        state, begin = jax.jit(tx.init)(params), 0
        if archive is not None:
            params = {n: jnp.asarray(archive[f"params/{n}"]) for n in params}
            begin = int(archive[f"state/{next(iter(params))}/step"])
            state = shampoo_jax.import_meta_state(
                archive, state, params, **golden_adapter.of_roots(trajectory.config)
            )

        def advance(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
            updates, state = tx.update(updates, state, params)
            # optax.apply_updates does not accept None for a missing update.
            return {
                n: p if updates[n] is None else p + updates[n] for n, p in params.items()
            }, state

        # Twelve tiny steps cost nothing, compiling them does: a third less without optimization.
        step = jax.jit(advance, compiler_options={"xla_backend_optimization_level": 0})
        worst = 0.0
        for t, gradients in enumerate(trajectory.gradients[begin:], begin):
            updates = {
                n: None if g is None else jnp.asarray(g, trajectory.dtype)
                for n, g in gradients.items()
            }
            params, state = step(updates, state, params)
            for n, value in params.items():
                worst = max(
                    worst,
                    _miss(trajectory, value, trajectory.expected[t][n], trajectory.spread[t][n]),
                )
        if trajectory.evaluated:
            averages = shampoo_jax.eval_params(state, params)
            for n, value in trajectory.evaluated.items():
                worst = max(
                    worst, _miss(trajectory, averages[n], value, trajectory.evaluated_spread[n])
                )
        return worst


def _miss(trajectory: Trajectory, ours: jax.Array, theirs: np.ndarray, spread: float) -> float:
    """The largest error over the tolerance; infinite where ours is not a number."""
    error = np.abs(np.asarray(ours, np.float64) - theirs).max(initial=0)
    return float(np.nan_to_num(error / (4 * spread + TOLERANCE[trajectory.dtype]), nan=np.inf))


def error(path: Path, states: Path | None = None) -> float:
    """The largest of `errors`."""
    return max(errors(path, states).values())


def errors(path: Path, states: Path | None = None) -> dict[str, float]:
    """The worst error over tolerance of a file of any layout, by mode where it has several.

    Args:
      path: npz file, or the json file of schedules or of multipliers.
      states: Folder of archives of the reference's state, to go on from the one of this name.

    Raises:
      ValueError: the file is not in the format, or has an option that we do not have; the message
        names file, key and value.
    """
    try:
        if golden_records.holds_records(path):
            return {"": golden_records.error(path)}
        if golden_medium.holds_medium(path):
            return {"": golden_medium.error(path)}
        if path.suffix == ".json":
            return golden_multipliers.errors(path)
        if golden_matrix.holds_cases(path):
            return {"": golden_matrix.worst_error(*golden_matrix.load(path))}
        if golden_transfer.holds_transfer(path):
            return {"": golden_transfer.error(path)}
        if golden_microbatches.holds_microbatches(path):
            return golden_microbatches.errors(path)
        if states is None:
            return {"": replay(load(path))}
        with np.load(states / path.name, allow_pickle=False) as archive:
            return {"": replay(load(path), archive=dict(archive))}
    except (ValueError, LookupError, OSError) as e:
        raise ValueError(f"{path}: {e}") from e


def _versions() -> str:
    """What the figures depend on."""
    device = jax.devices()[0].device_kind
    cores = f"{os.cpu_count()} cores {platform.machine()}"
    return f"Python {platform.python_version()}, jax {jax.__version__}, device {device}, {cores}"


def main(argv: list[str] | None = None) -> int:
    """Replays the files named on the command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="recorded files (.npz, .json)")
    parser.add_argument("--table", type=Path, help="Markdown file to write the errors to as well")
    parser.add_argument(
        "--states", type=Path, help="folder of the reference's states to go on from"
    )
    options = parser.parse_args(argv)
    failed, rows = False, []
    for path in options.files:
        try:
            found = errors(path, options.states)
        except ValueError as e:
            failed = True
            print(f"{path.stem:40s}    REFUSED {e}", flush=True)
            rows.append(f"| {path.stem} | refused |")
            continue
        for mode, worst in found.items():
            failed |= worst > 1
            name = f"{path.stem} {mode}".strip()
            print(f"{name:40s} {worst:10.4f} {'' if worst <= 1 else 'MISS'}", flush=True)
            rows.append(f"| {name} | {worst:.4f} |")
    if options.table:
        options.table.write_text(TABLE.format(versions=_versions(), rows="\n".join(rows)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
