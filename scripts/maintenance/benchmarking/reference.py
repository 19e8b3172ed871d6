"""Times Meta's PyTorch package on the same matrices; run by `benchmark_step --against PATH`.

A process of its own: torch and jax would share cores and device memory otherwise. jax only makes
the gradients here, on the CPU and off the clock. Options come as JSON in the first argument, the
result is the last line of standard output.
"""

import importlib
import json
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

from scripts.maintenance.benchmarking.timing import time_calls

MODULES = (
    "distributed_shampoo",
    "distributed_shampoo.shampoo_types",
    "distributed_shampoo.preconditioner.matrix_functions_types",
)


def measure_reference(path: str, options: dict[str, Any]) -> dict[str, Any]:
    """Times the package in another process.

    Args:
        path: Folder that holds the package `distributed_shampoo`; torch may be installed or there.
        options: "layers", "width", "every", "block_size" (None for whole matrices), "rounds",
            "device" ("cpu" or "cuda").

    Returns:
        A record like those of the other optimizers.

    Raises:
        ValueError: The folder is missing, or the package or torch cannot be imported or run.
    """
    if not os.path.isdir(path):
        raise ValueError(
            f"against={path!r} is no folder: name the one that holds Meta's distributed_shampoo, "
            "a clone of https://github.com/facebookresearch/optimizers."
        )
    given = json.dumps({**options, "path": os.path.abspath(path)})
    command = [sys.executable, "-m", "scripts.maintenance.benchmarking.reference", given]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"against={path!r}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Runs in the other process."""
    options = json.loads(sys.argv[1])
    sys.path.insert(0, options["path"])
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        sys.exit(f"{error}: pip install torch")
    try:
        modules = [importlib.import_module(MODULES[0])]
    except ImportError as error:
        sys.exit(
            f"{error}: name the folder that holds distributed_shampoo, a clone of "
            "https://github.com/facebookresearch/optimizers"
        )
    for name in MODULES[1:]:
        try:
            modules.append(importlib.import_module(name))
        except ImportError:
            continue
    print(json.dumps(time_package(torch, modules, options)))


def time_package(torch: Any, modules: list[ModuleType], options: dict[str, Any]) -> dict[str, Any]:
    """Times the package with record 35's settings, blocks apart.

    Args:
        torch: The module.
        modules: Where the package's names may live; it has moved them between versions.
        options: See `measure_reference`.
    """
    import jax
    import numpy as np

    from scripts.maintenance.benchmarking.gradients import coloured_gradients
    from scripts.maintenance.compile_size import gpt2_matrices

    shapes = jax.tree.leaves(gpt2_matrices(options["layers"], options["width"]))
    make = coloured_gradients(shapes)
    device, on_gpu = options["device"], options["device"] == "cuda"

    def tensor(x: Any) -> Any:
        return torch.from_numpy(np.array(x, np.float32)).to(device)

    params = [torch.nn.Parameter(tensor(np.full(s.shape, 0.02))) for s in shapes]
    optimizer = _optimizer(params, modules, options)

    def prepare(step: int) -> list[Any]:
        gradients = [tensor(g) for g in make(step)]
        if on_gpu:
            torch.cuda.synchronize()
        return gradients

    def call(gradients: list[Any]) -> None:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()

    every, rounds = options["every"], options["rounds"]
    times = time_calls(call, prepare, rounds=rounds, calls=every, warmup=max(2, every))
    return {"name": f"meta_{every}", "every": every, **times.summary()}


def _optimizer(params: list[Any], modules: list[ModuleType], options: dict[str, Any]) -> Any:
    def named(name: str) -> Any:
        for module in modules:
            if hasattr(module, name):
                return getattr(module, name)
        sys.exit(f"distributed_shampoo has no {name}: use its version of August 2026")

    pseudo_inverse = named("PseudoInverseConfig")(rank_rtol=None)
    roots = named("EigenConfig")(rank_deficient_stability_config=pseudo_inverse)
    return named("DistributedShampoo")(
        params,
        lr=1e-3,
        betas=(0.9, 0.9),
        epsilon=0.0,
        weight_decay=0.1,
        max_preconditioner_dim=options["block_size"] or max(max(p.shape) for p in params),
        precondition_frequency=options["every"],
        grafting_config=named("AdamPreconditionerConfig")(beta2=0.9, epsilon=1e-15),
        preconditioner_config=named("RootInvShampooPreconditionerConfig")(
            amortized_computation_config=roots
        ),
    )


if __name__ == "__main__":
    main()
