"""How long XLA's compilers take for parts of an optimizer, on hardware that is not here.

    build/compilers/bin/python -m scripts.maintenance.compilers --target v5e:2x4

Compiles the inverse roots of one stack, then the update of `shampoo` with them for the hidden
matrices of a GPT-2 of width 768, one layer and twelve, and prints a line of JSON for each: seconds
of the compiler and its processor time, which other programs on the machine do not change, products
in the program that it was given, memory, and what the program does. `make compilers` makes the
environment.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

import shampoo_jax
from nanogpt.lab.plan import start_again
from scripts.maintenance.compile_size import gpt2_matrices
from shampoo_jax import Compiled, Target, compile_for, compile_update, target_devices
from shampoo_jax.matrix import polynomial_root

WIDTH = 768
STACK = 2  # roots at a time, as `shampoo` takes them in chunks


def root(target: Target, semantics: Any) -> Compiled:
    """Inverse fourth roots of a stack by products, without what is done where they fail."""
    here = SingleDeviceSharding(target.devices[0])
    factor = jax.ShapeDtypeStruct((STACK, WIDTH, WIDTH), jnp.float32, sharding=here)
    solve = functools.partial(polynomial_root, exponent=0.25, semantics=semantics)
    return compile_for(target, solve, [factor])


def update(target: Target, layers: int, solver: str, block_size: int | None) -> Compiled:
    """The update of `shampoo` on hidden matrices, every device an owner of blocks."""
    mesh = Mesh(np.array(target.devices), ("data",), axis_types=(AxisType.Auto,))
    tx = shampoo_jax.shampoo(
        0.1,
        solver=solver,
        blocking=shampoo_jax.Blocking(block_size),
        placement=shampoo_jax.Placement(mesh, "data"),
    )
    return compile_update(tx, gpt2_matrices(layers, WIDTH), target, mesh=mesh)


def record(found: Compiled) -> dict[str, Any]:
    """As JSON types."""
    fields = {k: v for k, v in vars(found).items() if k not in ("target", "program")}
    rounded = {k: round(v, 1) if isinstance(v, float) else v for k, v in fields.items()}
    return rounded | (dataclasses.asdict(found.program) if found.program else {})


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="v5e:2x4")
    parser.add_argument("--solver", default="polynomial", choices=shampoo_jax.solver_names())
    parser.add_argument("--block-size", type=int, default=1024, help="8192: no blocks")
    parser.add_argument("--only", nargs="*", help="parts: cut, clip, 1, 12")
    args = parser.parse_args()
    start_again(args.target, "scripts.maintenance.compilers", *sys.argv[1:])
    try:
        target = target_devices(args.target)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    parts: dict[str, Callable[[], Compiled]] = {
        "cut": lambda: root(target, "cut"),
        "clip": lambda: root(target, "clip"),
        "1": lambda: update(target, 1, args.solver, args.block_size),
        "12": lambda: update(target, 12, args.solver, args.block_size),
    }
    for name, part in parts.items():
        if not args.only or name in args.only:
            label = {"target": args.target, "part": name, "jax": jax.__version__}
            print(json.dumps(label | record(part())), flush=True)


if __name__ == "__main__":
    main()
