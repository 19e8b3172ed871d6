"""Replays recorded optimizer trajectories and reports the worst error over tolerance per file.

    python -m scripts.replay_golden tests/golden/meta/*.npz

A file holds a config in JSON, initial parameters, gradients, the reference's parameters after every
step and `spread`, how far rounding alone moves the reference. A parameter agrees if its error is
within `4 * spread + 1e-6` (float32) or `4 * spread + 1e-11` (float64). Exits 1 on a miss.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shampoo_jax

TOLERANCE = {"float32": 1e-6, "float64": 1e-11}


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

    @property
    def dtype(self) -> str:
        """Precision of the run, `"float32"` or `"float64"`."""
        return self.config.get("dtype", "float32")


def load(path: Path) -> Trajectory:
    """Reads a trajectory file.

    Args:
      path: npz file as described in the module's docstring.

    Returns:
      The trajectory; gradients that were missing are None.
    """
    with np.load(path) as z:
        names = json.loads(str(z["names"]))
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
        )


def unlimited(value: Any) -> Any:
    """The config's `"inf"` is None here."""
    return None if value == "inf" else value


def solver(config: dict[str, Any]) -> shampoo_jax.Solver:
    """The inverse-root solver of a config."""
    rank = config["preconditioner"]["rank"]
    if rank["kind"] == "pseudo":
        return shampoo_jax.TruncatedEigh(rank["rtol"], rank["atol"])
    return shampoo_jax.ShiftedEigh(config["epsilon"], rank["before"])


def exponents(config: dict[str, Any]) -> dict[int, Any] | None:
    """The config's exponent overrides with integer keys."""
    override = config["preconditioner"]["exponents"]
    if not override:
        return None
    return {
        int(order): {int(k): v for k, v in e.items()} if isinstance(e, dict) else e
        for order, e in override.items()
    }


def magnitude(config: dict[str, Any]) -> optax.GradientTransformation | None:
    """The graft of a config as a part, None without one."""
    graft = config["graft"]
    kind, b2, eps = graft["kind"], graft.get("beta2"), graft.get("epsilon")
    weighted = not graft.get("unweighted_update", False)
    match kind:
        case "none":
            return None
        case "sgd":
            return shampoo_jax.on_updates(optax.identity())
        case "adagrad":
            return shampoo_jax.scale_by_second_moment(1.0, eps)
        case "rmsprop" | "adam":
            return shampoo_jax.scale_by_second_moment(
                b2, eps, bias_correction=kind == "adam", weighted=weighted
            )
    raise ValueError(f"graft kind {kind!r} is not in the format.")


def direction(config: dict[str, Any]) -> optax.GradientTransformation:
    """The preconditioned direction of a config, without decay and learning rate."""
    preconditioner = config["preconditioner"]
    start = config["first_refresh_step"]
    return shampoo_jax.scale_by_shampoo(
        config["beta1"],
        config["beta2"],
        b3=config["beta1_output"] if config["beta1"] else None,
        bias_correction=config["bias_correction"],
        block_size=unlimited(config["max_block_dim"]),
        merge=unlimited(config["merge_target_order"]),
        canonical=False,
        exponents=exponents(config),
        weighted=not preconditioner["unweighted_update"],
        solver=solver(config),
        every=config["refresh_interval"],
        start=None if start == -1 else start,
        graft=magnitude(config),
    )


def optimizer(trajectory: Trajectory) -> optax.GradientTransformation:
    """The full optimizer of a trajectory, its learning rates as a schedule."""
    config = trajectory.config
    # The reference casts its rate to float32 even where parameters are float64.
    rates = jnp.asarray(trajectory.learning_rates.astype(np.float32), trajectory.dtype)
    decay = optax.add_decayed_weights(config["weight_decay"])
    parts = [direction(config), optax.scale_by_learning_rate(lambda count: rates[count])]
    if config["weight_decay"]:
        parts.insert(0 if config["weight_decay_kind"] == "l2" else 1, decay)
    return optax.chain(*parts)


def replay(
    trajectory: Trajectory,
    make: Callable[[Trajectory], optax.GradientTransformation] = optimizer,
) -> float:
    """Runs a trajectory and returns the worst error as a multiple of the tolerance.

    Args:
      trajectory: What was recorded.
      make: Builds the optimizer; another one in tests that want to see a miss.

    Returns:
      The largest error over tolerance over all steps and parameters; at most 1 is agreement.
    """
    # enable_x64 is a context so that one process can replay files of both precisions.
    with jax.enable_x64(trajectory.dtype == "float64"):
        tx = shampoo_jax.accept_missing(make(trajectory))
        params = {n: jnp.asarray(p, trajectory.dtype) for n, p in trajectory.params.items()}
        state, step = tx.init(params), jax.jit(tx.update)
        worst = 0.0
        for t, gradients in enumerate(trajectory.gradients):
            updates = {
                n: None if g is None else jnp.asarray(g, trajectory.dtype)
                for n, g in gradients.items()
            }
            updates, state = step(updates, state, params)
            # optax.apply_updates does not accept None for a missing update.
            params = {n: p if updates[n] is None else p + updates[n] for n, p in params.items()}
            for n, value in params.items():
                error = np.abs(np.asarray(value, np.float64) - trajectory.expected[t][n]).max()
                tolerance = 4 * trajectory.spread[t][n] + TOLERANCE[trajectory.dtype]
                worst = max(worst, float(np.nan_to_num(error / tolerance, nan=np.inf)))
        return worst


def main(argv: list[str] | None = None) -> int:
    """Replays the files named on the command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="trajectory files (.npz)")
    misses = 0
    for path in parser.parse_args(argv).files:
        worst = replay(load(path))
        misses += worst > 1
        print(f"{path.stem:40s} {worst:10.4f} {'' if worst <= 1 else 'MISS'}", flush=True)
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
