"""The counts of the scaling model beside those of compiled programs, on fake devices."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax

from scripts.maintenance.compile_size import gpt2_matrices
from scripts.maintenance.sharding_table import compile_update, make_mesh
from shampoo_jax import (
    Placement,
    Polynomial,
    PrecisionPolicy,
    accumulate_factors,
    blocked,
    exchanges,
    explain,
    precondition,
    scale_by_shampoo,
)

# Named, so that XLA on CPU gets the program of an accelerator: all the roots of a stack at once.
# Of a loop over them, what CPU has otherwise, it counts one turn.
SOLVER = Polynomial(precision=PrecisionPolicy(jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST))


def block_flops(blocks: Mapping[str, int]) -> float:
    """FLOPs of statistics, and as many of application, of matrices by key and number.

    >>> block_flops({"4x2": 3})
    288.0
    """
    sizes = [([int(d) for d in key.split("x")], n) for key, n in blocks.items()]
    return float(sum(n * 2 * math.prod(dims) * sum(dims) for dims, n in sizes))


def bytes_per_flop(blocks: Mapping[str, int]) -> float:
    """Of root products: two float32 matrices read and one written for `2 d^3` FLOPs.

    >>> bytes_per_flop({"4x4": 3})  # 12 d^2 of 2 d^3
    1.5
    """
    edges = [(int(d), n) for key, n in blocks.items() for d in key.split("x")]
    return sum(n * 12 * d**2 for d, n in edges) / sum(n * 2 * d**3 for d, n in edges)


def _counted(compiled: jax.stages.Compiled) -> tuple[float, float]:
    """FLOPs and bytes accessed, XLA's own analysis."""
    costs: Any = compiled.cost_analysis()
    return costs["flops"], costs["bytes accessed"]


def compare(params: Any, devices: int) -> dict[str, Any]:
    """Compiles the update and its parts for some of the devices, and counts.

    Args:
      params: Shape structs of matrices, all preconditioned and replicated.
      devices: Number of owners.

    Returns:
      By part `[predicted, compiled]`, both of one device: FLOPs of `statistics`, `apply` and
      `roots`, each what a program gains by that part, roots with all else of `scale_by_shampoo`;
      bytes that are `gathered`, of the `state` and of `temporary` memory; `bytes` accessed, of
      which the model counts the state, once read and once written, and the matrices of root
      products.
    """
    placement = Placement(make_mesh({"data": devices}), "data")
    parts = {
        "statistics": [accumulate_factors()],
        "apply": [accumulate_factors(), precondition()],
    }
    flops = {}
    for name, chain in parts.items():
        tx = blocked(optax.chain(*chain), placement=placement)
        flops[name] = _counted(compile_update(tx, placement, params)[0])[0]
    tx = scale_by_shampoo(solver=SOLVER, placement=placement)
    compiled, state = compile_update(tx, placement, params)
    whole, accessed = _counted(compiled)
    report = explain(params, scale_by_shampoo(solver=SOLVER), mesh={"data": devices})
    there = report.on_mesh
    assert there is not None
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )
    memory: Any = compiled.memory_analysis()
    # Six matrices at a time for each root of the largest batch, see `shampoo_jax.Cost`.
    working = max(n * 24 * int(d) ** 2 for k, n in there.blocks.items() for d in k.split("x"))
    found = exchanges(compiled.as_text() or "").get("all-gather", (0, 0))[1]
    planned = there.exchanges.get("all-gather", (0, 0))[1]
    share = block_flops(there.blocks)
    traffic = there.refresh_flops * bytes_per_flop(there.blocks)
    copy = sum(x.size * 4 for x in jax.tree.leaves(params))
    return {
        "statistics": [share, flops["statistics"]],
        "apply": [share, flops["apply"] - flops["statistics"]],
        "roots": [there.refresh_flops, whole - flops["apply"]],
        "gathered": [planned, found],
        "state": [there.state_bytes, held],
        "temporary": [copy + working, memory.temp_size_in_bytes],
        "bytes": [2 * there.state_bytes + traffic, accessed],
    }


def validate(layers: int = 2, width: int = 32) -> dict[str, Any]:
    """Compares for 1, 2, 4 and 8 devices.

    Args:
      layers: Of a GPT-2's hidden matrices.
      width: Likewise.
    """
    params = gpt2_matrices(layers, width)
    return {
        "jax": jax.__version__,
        "layers": layers,
        "width": width,
        "devices": {str(n): compare(params, n) for n in (1, 2, 4, 8)},
    }
