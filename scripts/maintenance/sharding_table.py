"""What a mesh costs and changes.

    python -m scripts.maintenance.sharding_table [--equality | --compile]

Without an option it compiles `shampoo`'s whole update, momentum and AdamW included, for eight
devices made of one CPU, once per layout of the parameters, and reads kind, number and bytes of the
exchanges out of the optimized program; nothing is executed. `--equality` runs every solver on every
layout in float64 against one device, `--compile` times compilation at 124M and 1.3B parameters.
Each writes its part of docs/sharding.json and all of docs/sharding.md.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, cast

if __name__ == "__main__":
    flags = (os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    # Fewer threads than devices can starve XLA's pool; LAPACK's own would slow it a hundred times.
    defaults = {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1", "NPROC": "32"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import shampoo_jax
from scripts.maintenance.compile_size import gpt2_matrices
from scripts.maintenance.sharding_equality import CUT, LAYOUTS, Layout, compare, equality, gapped
from scripts.maintenance.sharding_page import page_of
from shampoo_jax import exchanges

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def gpt2_shapes(layers: int, width: int, rows: int | None = None) -> dict[str, Any]:
    """Hidden matrices of a GPT-2, an embedding of so many rows (8 widths), a norm per layer."""
    norms = {f"norm{i}": jax.ShapeDtypeStruct((width,), jnp.float32) for i in range(layers)}
    embedding = {"embed": jax.ShapeDtypeStruct((rows or 8 * width, width), jnp.float32)}
    return gpt2_matrices(layers, width) | embedding | norms


def make_mesh(axes: Mapping[str, int]) -> jax.sharding.Mesh:
    """A mesh of the first devices."""
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def lower_update(
    tx: optax.GradientTransformationExtraArgs, placement: shampoo_jax.Placement, params: Any
) -> tuple[jax.stages.Lowered, Any]:
    """Lowers the update of a transformation that has this placement, from shapes alone.

    Args:
      tx: The transformation.
      placement: On a mesh of devices that are there.
      params: Shape structs.

    Returns:
      The lowered program, and the state as shape structs with shardings.
    """
    mesh, spec = cast(jax.sharding.Mesh, placement.mesh), placement.parameter_spec
    placed = jax.tree_util.tree_map_with_path(
        lambda path, x: _struct(x, NamedSharding(mesh, spec(path, x))), params
    )
    shardings = shampoo_jax.state_shardings(tx, placed, mesh)
    state = jax.tree.map(_struct, jax.eval_shape(tx.init, params), shardings)
    return jax.jit(tx.update).lower(placed, state, placed), state


def compile_update(
    tx: optax.GradientTransformationExtraArgs, placement: shampoo_jax.Placement, params: Any
) -> tuple[jax.stages.Compiled, Any]:
    """`lower_update`, compiled."""
    lowered, state = lower_update(tx, placement, params)
    return lowered.compile(), state


def placement_on(layout: Layout) -> shampoo_jax.Placement:
    """The placement that one of `LAYOUTS` describes."""
    axes, owners, spec = layout
    return shampoo_jax.Placement(make_mesh(axes), owners, spec)


def measure(layout: Layout, params: Any, **options: Any) -> dict[str, Any]:
    """Compiles one update and reads its exchanges, memory and state.

    Args:
      layout: One of `LAYOUTS`.
      params: Shape structs.
      **options: Of `shampoo`.

    Returns:
      A record of JSON types.
    """
    axes, owners, spec = layout
    placement = placement_on(layout)
    tx = shampoo_jax.shampoo(0.1, placement=placement, **options)
    compiled, state = compile_update(tx, placement, params)
    leaves = jax.tree.leaves(state)
    bare = shampoo_jax.shampoo(0.1, **options)
    report = shampoo_jax.explain(params, bare, mesh=axes, owners=owners, parameter_spec=spec)
    assert report.on_mesh is not None
    return {
        "exchanges": exchanges(compiled.as_text() or ""),
        "planned": report.on_mesh.exchanges,
        "temporary_bytes": _temporary(compiled),
        "parameter_bytes": _bytes(params),
        "state_bytes": _bytes(state),
        "state_bytes_per_device": sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves
        ),
        "planned_state_bytes_per_device": report.on_mesh.state_bytes,
    }


def working_memory(layout: Layout, matrices: Any) -> dict[str, int]:
    """Temporary bytes of the way of matrices to owners and back, and of a whole direction.

    Args:
      layout: One of `LAYOUTS`.
      matrices: Shape structs.
    """
    placement = placement_on(layout)
    parts = {
        "moves": shampoo_jax.blocked(optax.identity(), placement=placement),
        "direction": shampoo_jax.scale_by_shampoo(placement=placement),
    }
    return {k: _temporary(compile_update(tx, placement, matrices)[0]) for k, tx in parts.items()}


def compile_seconds(layout: Layout, params: Any, **options: Any) -> dict[str, Any]:
    """Times tracing and compiling one update of `shampoo`; nothing is allocated.

    Args:
      layout: One of `LAYOUTS`.
      params: Shape structs.
      **options: Of `shampoo`.

    Returns:
      A record of JSON types; `cpu_s` is the process's time, on all its threads.
    """
    begin = time.perf_counter()
    placement = placement_on(layout)
    tx = shampoo_jax.shampoo(0.1, placement=placement, **options)
    lowered, _ = lower_update(tx, placement, params)
    traced, cpu = time.perf_counter(), time.process_time()
    compiled = lowered.compile()
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "trace_s": round(traced - begin, 1),
        "compile_s": round(time.perf_counter() - traced, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "program_kb": len(compiled.as_text() or "") // 1000,
        "temporary_bytes": _temporary(compiled),
        "exchanges": exchanges(compiled.as_text() or ""),
    }


def _temporary(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _struct(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def decomposed_on_gpu(devices: int, params: Any) -> list[str]:
    """Operand shapes of the batched eigendecompositions that one device of a GPU mesh is given.

    Args:
      devices: Number of owners; as many have to be there, of any kind. Nothing is compiled.
      params: Shape structs.

    Returns:
      `["2x64x64", ...]`, each once.
    """
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    placement = shampoo_jax.Placement(mesh, "data")
    tx = shampoo_jax.scale_by_shampoo(solver="eigh", placement=placement)
    placed = jax.tree.map(lambda x: _struct(x, NamedSharding(mesh, P())), params)
    traced = jax.jit(tx.update).trace(placed, jax.eval_shape(tx.init, params))
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"@cusolver_syev\w*\(.*?: \(tensor<([\dx]+)xf32>", program)
    return sorted(set(calls))


def _table(layers: int, width: int) -> Iterator[dict[str, Any]]:
    params, matrices = gpt2_shapes(layers, width), gpt2_matrices(layers, width)
    variants: dict[str, dict[str, Any]] = {
        "Without momentum": {"weight_decay": 0.1},
        "With momentum": {"weight_decay": 0.1, "momentum": 0.9},
    }
    chosen = list(LAYOUTS)[:6]  # the others need stacked parameters
    records = {
        title: {name: measure(LAYOUTS[name], params, **options) for name in chosen}
        for title, options in variants.items()
    }
    yield {
        "layers": layers,
        "width": width,
        "layouts": records,
        "matrix_bytes": _bytes(matrices),
        "working_memory": {name: working_memory(LAYOUTS[name], matrices) for name in chosen},
        "eigh_operands_on_8_gpus": decomposed_on_gpu(8, matrices),
    }


def _equality() -> Iterator[dict[str, Any]]:
    errors: dict[str, dict[str, float]] = {}
    for name, worst in equality():
        errors[name] = worst
        yield {"equality": errors}
    narrow: dict[str, dict[str, float]] = {}
    for name, worst in compare(("replicated", "rows", "rows and columns"), CUT, gapped):
        narrow[name] = worst
        yield {"equality_float32": narrow}


def _compile() -> Iterator[dict[str, Any]]:
    models = {"124M": gpt2_shapes(12, 768, 50304), "1.3B": gpt2_shapes(24, 2048, 50304)}
    found: dict[str, Any] = {}
    for model, params in models.items():
        for layout in ("replicated", "rows", "a group of owners"):
            record = compile_seconds(LAYOUTS[layout], params, weight_decay=0.1)
            found[f"{model}, {layout}"] = record
            yield {"compile": found}


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--equality", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=DOCS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "sharding.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    table = _table(args.layers, args.width)
    parts = _equality() if args.equality else _compile() if args.compile else table
    for part in parts:  # a long run that is cut keeps what it has
        results |= part | {"jax": jax.__version__, "python": platform.python_version()}
        path.write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "sharding.md").write_text(page_of(results))
    print(page_of(results))


if __name__ == "__main__":
    main()
