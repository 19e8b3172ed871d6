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
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import shampoo_jax
from scripts.maintenance import golden_adapter, replay_golden

MODULES = ("torch", "distributed_shampoo", "distributed_shampoo.shampoo_types")
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
    "kl_eig": "EigendecomposedKLShampooPreconditionerConfig",
}
DIAGONAL = {
    "sgd": "SGDPreconditionerConfig",
    "adagrad": "AdaGradPreconditionerConfig",
    "rmsprop": "RMSpropPreconditionerConfig",
    "adam": "AdamPreconditionerConfig",
}


class Package(NamedTuple):
    """The modules that are needed."""

    torch: Any
    shampoo: Any
    types: Any  # what its front does not export


def load_package(folder: Path) -> Package:
    """Imports torch and the package.

    Args:
        folder: Holds `distributed_shampoo`.

    Raises:
        ValueError: One of them cannot be imported.
    """
    # Kernels that every processor has: with those of some the package misses its own recording of
    # 09, where rounding decides what a cutoff of 0 keeps.
    os.environ["ATEN_CPU_CAPABILITY"] = "default"
    sys.path.insert(0, str(folder))
    try:
        return Package(*map(importlib.import_module, MODULES))
    except ImportError as error:
        raise ValueError(
            f"{error}: install torch, and name the folder of distributed_shampoo, not {folder}."
        ) from error


def make_optimizer(package: Package, params: list[Any], config: dict[str, Any], peak: float) -> Any:
    """The package's optimizer for a recorded config.

    Args:
        package: From `load_package`.
        params: Parameters of torch.
        config: In the words of the recordings.
        peak: Largest learning rate.

    Raises:
        ValueError: A config of a kind whose state is not recorded.
    """
    shampoo = package.shampoo
    if config["dtype"] != "float32":
        raise ValueError("only states in float32 are recorded.")
    output = config["beta1_output"]
    return shampoo.DistributedShampoo(
        params,
        lr=peak,
        betas=(config["beta1"], config["beta2"]),
        beta3=-1.0 if output is None else output,
        epsilon=config["epsilon"],
        weight_decay=config["weight_decay"],
        weight_decay_type=shampoo.WeightDecayType[DECAY[config["weight_decay_kind"]]],
        max_preconditioner_dim=_size(config["max_block_dim"]),
        precondition_frequency=config["refresh_interval"],
        start_preconditioning_step=config["first_refresh_step"],
        use_bias_correction=config["bias_correction"],
        iterate_averaging_config=_averaging(package.types, config["momentum"], config["averaging"]),
        grafting_config=_diagonal(shampoo, config["graft"]),
        distributed_config=shampoo.SingleDeviceDistributedConfig(
            target_parameter_dimensionality=_size(config["merge_target_order"])
        ),
        preconditioner_config=_preconditioner(shampoo, config["preconditioner"]),
    )


def _size(value: int | str) -> float:
    return math.inf if value == "inf" else int(value)


def _averaging(types: Any, momentum: Any, averaging: Any) -> Any:
    if momentum:
        nesterov = {"use_nesterov": momentum["nesterov"]}
        rest = {key: momentum[key] for key in ("momentum", "dampening")}
        return types.ClassicMomentumConfig(**nesterov, **rest)
    if not averaging:
        return None
    train = {"train_interp_coeff": averaging["train_coeff"]}
    if averaging["kind"] == "primal":
        return types.GeneralizedPrimalAveragingConfig(
            eval_interp_coeff=averaging["eval_coeff"], **train
        )
    return types.ScheduleFreeConfig(eval_coeff_lr_power=averaging["lr_power"], **train)


def _diagonal(shampoo: Any, entry: dict[str, Any]) -> Any:
    if entry["kind"] == "none":
        return None
    names = {"beta2": "beta2", "epsilon": "epsilon"}
    names["unweighted_update"] = "drop_weighting_factor_on_gsquare"
    options = {theirs: entry[ours] for ours, theirs in names.items() if ours in entry}
    return getattr(shampoo, DIAGONAL[entry["kind"]])(**options)


def _preconditioner(shampoo: Any, entry: dict[str, Any]) -> Any:
    """Kronecker factors with the method and the rule for eigenvalues of a config."""
    kind, solver, rank = entry["kind"], entry["solver"], entry["rank"]
    if kind not in KINDS or solver["kind"] not in ("eigh", "qr"):
        raise ValueError(f"preconditioner {entry} is not recorded.")
    if rank["kind"] == "pseudo":
        rule = shampoo.PseudoInverseConfig(rank_atol=rank["atol"], rank_rtol=rank["rtol"])
    else:
        rule = shampoo.PerturbationConfig(perturb_before_computation=rank["before"])
    name = "EigenConfig" if kind.endswith("_root") else f"{solver['kind']}EigendecompositionConfig"
    name = name.replace("qr", "QR").replace("eighE", "EighE")
    method = {key: solver[key] for key in ("max_iterations", "tolerance") if key in solver}
    options: dict[str, Any] = {
        "amortized_computation_config": getattr(shampoo, name)(
            rank_deficient_stability_config=rule, **method
        ),
        "inverse_exponent_override": golden_adapter.exponents({"preconditioner": entry}) or {},
        "drop_weighting_factor_on_gsquare": entry["unweighted_update"],
        "use_trace_scaling": entry["trace_scaling"] is not None,
        "trace_scaling_exponent": entry["trace_scaling"] or 0.5,
    }
    if entry["skip_basis"]:
        options["ignored_basis_change_dims"] = {int(k): v for k, v in entry["skip_basis"].items()}
    return getattr(shampoo, KINDS[kind])(**options)


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
    optimizer = make_optimizer(
        package, list(params.values()), trajectory.config, float(rates.max())
    )
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
