"""The page docs/sharding.md, from the figures in docs/sharding.json."""

from collections.abc import Mapping
from typing import Any

from scripts.maintenance.scaling_page import table

HEAD = """# What a mesh costs and changes

Every figure is from docs/sharding.json, which `python -m scripts.maintenance.sharding_table`
writes; the sections name its options. Machine: 2 cores of an x86-64 VM, jax {jax}, eight devices
made of one CPU.
"""

TABLE = """
## Exchanges, memory and state

`python -m scripts.maintenance.sharding_table`: `shampoo`'s whole update (blocks, decay, AdamW on
the rest, with and without momentum) compiled, not executed. Parameters: {layers} layers of a GPT-2
of width {width}, an embedding of {rows} x {width} and a norm a layer, float32, {parameters:,}
bytes.

* **Exchanges** are counted in the optimized program. Bytes are those of their results on one
  device; of n devices, each sends and receives (n - 1)/n of that. The all-reduce is the test for
  finite gradients, where a device has but a part of them.
* Matrices that are cut alike are exchanged as one array: more layers are not more exchanges.
* **Planned** is what `explain(..., mesh=...)` predicts from shapes alone. It is what the
  compiler does, number and bytes, but for the permutations that it adds where blocks of a
  transposed matrix, split over two axes of the mesh, join a stack.
* **State per device** has equalled the prediction of `explain` to the byte in every line.
* Momentum is a tree of parameters, split over the owners whatever the layout: updates come to it
  split and are gathered after it, parameter by parameter.
"""

MEMORY = """
### Temporary memory

In copies of the whole update of the matrices, {matrices:,} bytes, of which a device with replicated
parameters has to hold one: of the way to the owners and back alone; of the direction, working
memory of the solver on the owner's blocks included; and of the optimizer without momentum. At this
width the solver's memory is as large as the update; the last table has models of true size.
"""

GPU = """
### The decomposition is the owner's alone

The same update lowered for GPUs, on 8 owners: the batched `eigh` gets {operands}: one eighth of 8
factors for each side of fc and proj, and of 16 for q, k, v and o. On CPU a loop takes these one at
a time.
"""

EQUALITY = """
## The same numbers as on one device

`python -m scripts.maintenance.sharding_table --equality`: seven steps of normal random gradients,
on three parameters of 16 x 16, one of 16 x 8 and one of 8 x 16, experts (8, 8, 8) and layers of
experts (2, 4, 8, 8) with batch axes, and vectors: 3 blocks of 16x16, 2 of 16x8 and 16 of 8x8, or
ragged ones of at most 10. SOAP and the KL ones take the square blocks: of a factor without full
rank rounding chooses part of the basis in which they work. They and the staggered ones refresh a
third of the blocks at each step.
Each entry is the largest difference of any update of any step from one device without a mesh,
relative to the largest entry of that parameter's update, in float64. (This run had XLA_FLAGS set to
`--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1`, to compile faster.)
"""

FLOAT32 = """
In float32 the same comparison means something only where no eigenvalue is near a cutoff: gradients
of half rank with the same singular vectors at every step, and a cutoff of 1e-3.
"""

COMPILE = """
## Time to compile

`python -m scripts.maintenance.sharding_table --compile`: one update of `shampoo` from shapes,
nothing is allocated. The machine was shared with other work, so that only CPU seconds, of all
threads of the process, can be compared. 124M is 12 layers of width 768, 1.3B is 24 layers of width
2048, both with an embedding of 50304 rows and the default blocks of 1024: at width 2048 every
matrix is cut into several, whose edges are split over devices in the layout by rows. Temporary
memory is given in copies of the whole update too, of which a device with replicated parameters has
to hold one.
"""


def page_of(results: Mapping[str, Any]) -> str:
    """Markdown of all parts that there are.

    Args:
      results: Contents of docs/sharding.json.
    """
    page = HEAD.format(**results)
    if "layouts" in results:
        record = next(iter(next(iter(results["layouts"].values())).values()))
        page += TABLE.format(
            layers=results["layers"],
            width=results["width"],
            rows=8 * results["width"],
            parameters=record["parameter_bytes"],
        )
        for title, records in results["layouts"].items():
            page += f"\n### {title}\n\n{exchange_table(records)}\n"
        page += MEMORY.format(matrices=results["matrix_bytes"]) + f"\n{memory_table(results)}\n"
        page += GPU.format(operands=", ".join(results["eigh_operands_on_8_gpus"]))
    if "equality" in results:
        page += f"{EQUALITY}\n{error_table(results['equality'])}\n"
    if "equality_float32" in results:
        page += f"{FLOAT32}\n{error_table(results['equality_float32'])}\n"
    if "compile" in results:
        page += f"{COMPILE}\n{compile_table(results['compile'])}\n"
    return page


def exchange_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a layout."""
    head = "layout; exchanges: count, bytes of results per device; planned bytes; temporary memory"
    rows = [
        [
            name,
            _exchanges(r["exchanges"]),
            _exchanges(r["planned"]),
            f"{r['temporary_bytes']:,}",
            f"{r['state_bytes_per_device']:,}",
            f"{r['state_bytes_per_device'] / r['state_bytes']:.4f}",
        ]
        for name, r in records.items()
    ]
    return table([*head.split("; "), "state per device", "of all"], rows)


def memory_table(results: Mapping[str, Any]) -> str:
    """One line a layout, in copies of the update of the matrices."""
    rows = []
    whole = next(iter(results["layouts"].values()))
    for name, found in results["working_memory"].items():
        sizes = [found["moves"], found["direction"], whole[name]["temporary_bytes"]]
        cells = [f"{x / results['matrix_bytes']:.2f}" for x in sizes]
        rows.append([name, *cells])
    return table(["layout", "the way alone", "direction", "optimizer"], rows)


def _exchanges(found: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(f"{n} {kind} {size:,}" for kind, (n, size) in found.items())


def error_table(errors: Mapping[str, Mapping[str, float]]) -> str:
    """One line a mesh, one column an optimizer."""
    names = list(next(iter(errors.values())))
    rows = [[mesh, *(f"{row[n]:.0e}" for n in names)] for mesh, row in errors.items()]
    return table(["mesh", *names], rows)


def compile_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a model and layout."""
    head = "model, layout; trace, s; compile, s; compile, CPU s; program, kB; temporary memory, MB"
    rows = [
        [
            name,
            *(str(r[key]) for key in ("trace_s", "compile_s", "cpu_s")),
            f"{r['program_kb']:,}",
            f"{r['temporary_bytes'] / 1e6:,.0f}",
            f"{r['temporary_bytes'] / (4 * r['parameters']):.2f}",  # float32
            _exchanges(r["exchanges"]),
        ]
        for name, r in records.items()
    ]
    return table([*head.split("; "), "in copies", "exchanges"], rows)
