"""What the compiled update exchanges and holds on a mesh: python -m scripts.sharding_table.

Compiles `shampoo`'s whole update, momentum and AdamW included, for eight devices made of one CPU,
once per layout of the parameters, and reads kind, number and bytes of the exchanges out of the
optimized program. Nothing is executed. Writes docs/sharding.json and docs/sharding.md.
"""

import argparse
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import shampoo_jax
from scripts.compile_size import gpt2_matrices

DOCS = pathlib.Path(__file__).parents[1] / "docs"
KINDS = "all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"
BYTES = {"pred": 1, "u8": 1, "bf16": 2, "f16": 2, "u16": 2, "f64": 8, "s64": 8}


def rows(axis: str) -> Callable[..., P]:
    """Everything but scalars split along its first dimension."""
    return lambda path, leaf: P(axis) if leaf.ndim else P()


def two_dimensional(path: Any, leaf: Any) -> P:
    """Matrices split along both dimensions."""
    return P("fsdp", "tensor") if leaf.ndim == 2 else rows("fsdp")(path, leaf)


# Layout -> mesh shape by axis, owners, layout of the parameters.
Layout = tuple[dict[str, int], str | tuple[str, ...], Callable[..., P]]
LAYOUTS: dict[str, Layout] = {
    "replicated": ({"data": 8}, "data", lambda path, leaf: P()),
    "rows": ({"fsdp": 8}, "fsdp", rows("fsdp")),
    "rows and columns": ({"fsdp": 4, "tensor": 2}, ("fsdp", "tensor"), two_dimensional),
    "replicas of rows": ({"replica": 2, "fsdp": 4}, ("replica", "fsdp"), rows("fsdp")),
    "a group of owners": ({"replica": 2, "data": 4}, "data", lambda path, leaf: P()),
}


def gpt2_shapes(layers: int, width: int) -> dict[str, Any]:
    """Hidden matrices of a GPT-2, an embedding, and a norm per layer."""
    norms = {f"norm{i}": jax.ShapeDtypeStruct((width,), jnp.float32) for i in range(layers)}
    embedding = {"embed": jax.ShapeDtypeStruct((8 * width, width), jnp.float32)}
    return gpt2_matrices(layers, width) | embedding | norms


def exchanges(program: str) -> dict[str, tuple[int, int]]:
    """Number of collectives of each kind in optimized HLO, and bytes of their results on a device.

    Args:
      program: Text of the module of one device.
    """
    found: dict[str, tuple[int, int]] = {}
    for shapes, kind in re.findall(rf"= (.*?) ({KINDS})(?:-start)?\(", program):
        size = sum(
            BYTES.get(dtype, 4) * math.prod(int(d) for d in dims.split(",") if d)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
        count, total = found.get(kind, (0, 0))
        found[kind] = (count + 1, total + size)
    return found


def make_mesh(axes: Mapping[str, int]) -> jax.sharding.Mesh:
    """A mesh of the first devices."""
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def compile_update(
    tx: optax.GradientTransformationExtraArgs, placement: shampoo_jax.Placement, params: Any
) -> tuple[jax.stages.Compiled, Any]:
    """Compiles the update of a transformation that has this placement.

    Args:
      tx: The transformation.
      placement: On a mesh of devices that are there.
      params: Shape structs.

    Returns:
      The program, and the state as shape structs with shardings.
    """
    mesh, spec = cast(jax.sharding.Mesh, placement.mesh), placement.parameter_spec
    placed = jax.tree_util.tree_map_with_path(
        lambda path, x: _struct(x, NamedSharding(mesh, spec(path, x))), params
    )
    shardings = shampoo_jax.state_shardings(tx, placed, mesh)
    state = jax.tree.map(_struct, jax.eval_shape(tx.init, params), shardings)
    return jax.jit(tx.update).lower(placed, state, placed).compile(), state


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
    placement = shampoo_jax.Placement(make_mesh(axes), owners, spec)
    tx = shampoo_jax.shampoo(0.1, placement=placement, **options)
    compiled, state = compile_update(tx, placement, params)
    memory: Any = compiled.memory_analysis()
    leaves = jax.tree.leaves(state)
    report = shampoo_jax.explain(params, mesh=axes, owners=owners, parameter_spec=spec, **options)
    assert report.on_mesh is not None
    return {
        "exchanges": exchanges(compiled.as_text() or ""),
        "planned": report.on_mesh.exchanges,
        "temporary_bytes": memory.temp_size_in_bytes,
        "parameter_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)),
        "state_bytes": sum(x.size * x.dtype.itemsize for x in leaves),
        "state_bytes_per_device": sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves
        ),
        "planned_state_bytes_per_device": report.on_mesh.state_bytes,
    }


def _struct(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, one line a layout."""
    lines = [
        "| layout | exchanges: count, bytes of results per device | planned bytes "
        "| temporary memory | state per device | of all |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in records.items():
        found = ", ".join(f"{n} {kind} {b:,}" for kind, (n, b) in r["exchanges"].items())
        planned = ", ".join(f"{kind} {b:,}" for kind, (_, b) in r["planned"].items())
        share = r["state_bytes_per_device"] / r["state_bytes"]
        lines.append(
            f"| {name} | {found} | {planned} | {r['temporary_bytes']:,} | "
            f"{r['state_bytes_per_device']:,} | {share:.4f} |"
        )
    return "\n".join(lines)


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


PAGE = """# What a mesh costs

Written by `python -m scripts.sharding_table`: `shampoo`'s whole update (blocks, decay, AdamW on the
rest, with and without momentum) compiled for eight devices made of one CPU, not executed.
Parameters: {layers} layers of a GPT-2 of width {width}, an embedding of {rows} x {width} and a
norm a layer, float32, {parameters:,} bytes.

* **Exchanges** are counted in the optimized program. Bytes are those of their results on one
  device; of n devices, each sends and receives (n - 1)/n of that. The all-reduce is the test for
  finite gradients.
* **Planned** is what `explain(..., mesh=...)` predicts from shapes alone. It is exact for
  all-gathers; of all-to-alls the compiler makes fewer and somewhat larger ones, up to 13 % here,
  and for two-dimensional layouts it adds permutations.
* **State per device** has equalled the prediction of `explain` to the byte in every line.
* Momentum is a tree of parameters: on a layout with replicas its update is gathered once more.

{tables}

## The decomposition is the owner's alone

The same update lowered for GPUs, on {devices} owners: the batched `eigh` gets {operands}:
one eighth of 8 factors for each side of fc and proj, and of 16 for q, k, v and o. On CPU a loop
takes these one at a time.
"""


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--out", type=pathlib.Path, default=DOCS)
    args = parser.parse_args()
    params = gpt2_shapes(args.layers, args.width)
    variants: dict[str, dict[str, Any]] = {
        "Without momentum": {"weight_decay": 0.1},
        "With momentum": {"weight_decay": 0.1, "momentum": 0.9},
    }
    records = {
        title: {name: measure(layout, params, **options) for name, layout in LAYOUTS.items()}
        for title, options in variants.items()
    }
    operands = decomposed_on_gpu(8, gpt2_matrices(args.layers, args.width))
    results = {"jax": jax.__version__, "layouts": records, "eigh_operands_on_8_gpus": operands}
    page = PAGE.format(
        layers=args.layers,
        width=args.width,
        rows=8 * args.width,
        parameters=sum(x.size * 4 for x in jax.tree.leaves(params)),
        tables="\n\n".join(f"## {title}\n\n{table(r)}" for title, r in records.items()),
        devices=8,
        operands=", ".join(operands),
    )
    (args.out / "sharding.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "sharding.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
