"""Records the state of Meta's `distributed_shampoo` in the middle of recorded trajectories.

    python -m scripts.maintenance.record_meta_states PACKAGE tests/golden/meta/01*.npz ...

PACKAGE is the folder that holds the package, a clone of facebookresearch/optimizers at f606606;
torch has to be installed. Each file's gradients are given to the package on the CPU; after half of
the steps its state and parameters are written as the archive that `import_meta_state` reads, into
tests/golden/meta_states. Torch and the package are needed for nothing else and no dependency.
"""

import argparse
import importlib
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

import shampoo_jax
from scripts.maintenance import replay_golden

OUT = Path(__file__).parents[2] / "tests" / "golden" / "meta_states"
DECAY = {
    "l2": "L2",
    "decoupled": "DECOUPLED",
    "lr_over_peak": "CORRECTED",
    "over_peak": "INDEPENDENT",
}
KINDS = {
    "kronecker_root": "RootInvShampooPreconditionerConfig",
    "kronecker_eig": "EigendecomposedShampooPreconditionerConfig",
    "eigenbasis_adam": "EigenvalueCorrectedShampooPreconditionerConfig",
    "kl_root": "RootInvKLShampooPreconditionerConfig",
}


class Package(NamedTuple):
    """The modules that are needed."""

    torch: Any
    shampoo: ModuleType


def load_package(folder: Path) -> Package:
    """Imports torch and the package.

    Args:
        folder: Holds `distributed_shampoo`.

    Raises:
        ValueError: One of them cannot be imported.
    """
    sys.path.insert(0, str(folder))
    try:
        return Package(*map(importlib.import_module, ("torch", "distributed_shampoo")))
    except ImportError as error:
        raise ValueError(
            f"{error}: install torch, and name the folder of distributed_shampoo, not {folder}."
        ) from error


def make_optimizer(package: Package, params: list[Any], config: dict[str, Any], rate: float) -> Any:
    """The package's optimizer for a recorded config.

    Args:
        package: From `load_package`.
        params: Parameters of torch.
        config: In the words of the recordings.
        rate: First learning rate.

    Raises:
        ValueError: A config of a kind whose state is not recorded.
    """
    shampoo = package.shampoo
    if config["momentum"] or config["averaging"] or config["dtype"] != "float32":
        raise ValueError("only directions in float32 are recorded, not momentum and averaging.")
    output = config["beta1_output"]
    return shampoo.DistributedShampoo(
        params,
        lr=rate,
        betas=(config["beta1"], config["beta2"]),
        beta3=-1.0 if output is None else output,
        epsilon=config["epsilon"],
        weight_decay=config["weight_decay"],
        weight_decay_type=shampoo.WeightDecayType[DECAY[config["weight_decay_kind"]]],
        max_preconditioner_dim=_size(config["max_block_dim"]),
        precondition_frequency=config["refresh_interval"],
        start_preconditioning_step=config["first_refresh_step"],
        use_bias_correction=config["bias_correction"],
        grafting_config=_graft(shampoo, config["graft"]),
        distributed_config=shampoo.SingleDeviceDistributedConfig(
            target_parameter_dimensionality=_size(config["merge_target_order"])
        ),
        preconditioner_config=_preconditioner(shampoo, config["preconditioner"]),
    )


def _size(value: int | str) -> float:
    return math.inf if value == "inf" else int(value)


def _graft(shampoo: ModuleType, graft: dict[str, Any]) -> Any:
    if graft["kind"] == "none":
        return None
    if graft["kind"] != "adam":
        raise ValueError(f"graft {graft['kind']!r} is not recorded, only none and adam.")
    return shampoo.AdamPreconditionerConfig(beta2=graft["beta2"], epsilon=graft["epsilon"])


def _preconditioner(shampoo: ModuleType, entry: dict[str, Any]) -> Any:
    """Kronecker factors with the solver and the rule for eigenvalues of a config."""
    kind, solver, rank = entry["kind"], entry["solver"], entry["rank"]
    plain = not (entry["exponents"] or entry["skip_basis"] or entry["trace_scaling"])
    if kind not in KINDS or not plain or entry["unweighted_update"]:
        raise ValueError(f"preconditioner {entry} is not recorded.")
    if rank["kind"] == "pseudo":
        rule = shampoo.PseudoInverseConfig(rank_atol=rank["atol"], rank_rtol=rank["rtol"])
    else:
        rule = shampoo.PerturbationConfig(perturb_before_computation=rank["before"])
    method: dict[str, Any] = {"rank_deficient_stability_config": rule}
    if kind.endswith("_root"):
        name = "EigenConfig"
    elif solver["kind"] == "qr":
        name, method["max_iterations"] = "QREigendecompositionConfig", solver["max_iterations"]
    else:
        name = "EighEigendecompositionConfig"
    if solver["kind"] not in ("eigh", "qr") or solver.get("tolerance"):
        raise ValueError(f"solver {solver} is not recorded.")
    amortized = getattr(shampoo, name)(**method)
    return getattr(shampoo, KINDS[kind])(amortized_computation_config=amortized)


def record(package: Package, path: Path) -> tuple[dict[str, Any], float]:
    """Runs the package over the first half of a trajectory.

    Args:
        package: From `load_package`.
        path: A recorded file.

    Returns:
        The archive, and the largest error over tolerance of its parameters.
    """
    torch, trajectory = package.torch, replay_golden.load(path)
    torch.set_num_threads(1)
    params = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in trajectory.params.items()}
    rates, half = trajectory.learning_rates, len(trajectory.learning_rates) // 2
    optimizer = make_optimizer(package, list(params.values()), trajectory.config, float(rates[0]))
    for rate, gradients in zip(rates[:half], trajectory.gradients[:half], strict=True):
        optimizer.param_groups[0]["lr"] = float(rate)
        for name, gradient in gradients.items():
            params[name].grad = None if gradient is None else torch.tensor(gradient)
        optimizer.step()
    archive = shampoo_jax.meta_archive({"params": params, "state": optimizer.state_dict()["state"]})
    errors = (
        np.abs(archive[f"params/{n}"] - p).max()
        / (4 * trajectory.spread[half - 1][n] + replay_golden.TOLERANCE["float32"])
        for n, p in trajectory.expected[half - 1].items()
    )
    return archive, float(max(errors))


def main(argv: list[str] | None = None) -> int:
    """Records the files named on the command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("package", type=Path, help="folder that holds distributed_shampoo")
    parser.add_argument("files", nargs="+", type=Path, help="recorded trajectories (.npz)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write")
    options = parser.parse_args(argv)
    package = load_package(options.package)
    options.out.mkdir(parents=True, exist_ok=True)
    missed = False
    for path in options.files:
        archive, error = record(package, path)
        target = options.out / path.name
        np.savez_compressed(target, **archive)
        print(f"{path.stem:30s} {error:8.4f} of the tolerance, {target.stat().st_size:,} bytes")
        missed |= not error <= 1
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
