"""What a run would be on devices that are not here: its programs, compiled from shapes alone."""

import bisect
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanogpt.config.run import Config
from nanogpt.optimizers.build import build_optimizer
from nanogpt.train.mesh import Layout, make_layout
from nanogpt.train.rates import DEVICES, Rates
from nanogpt.train.train_step import (
    TrainState,
    abstract_params,
    make_eval_step,
    make_train_step,
    model_structure,
)
from shampoo_jax import Compiled, Target, compile_for, state_shardings

RATES = {
    **{"a100": "A100 SXM 80 GB", "h100": "H100 SXM", "h200": "H200 SXM", "b200": "B200 SXM"},
    **{"v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e"},
}
# Of peak rates, products, memory and links alike: what runs reach, see docs/scaling.md.
EFFICIENCY = 0.4


def abstract_step(config: Config, layout: Layout) -> tuple[Any, TrainState, Any]:
    """The jitted training step of a run, and shapes of its state and batch where they lie.

    Args:
        config: the run.
        layout: on devices of any kind; nothing is computed.
    """
    mesh = layout.mesh

    def struct(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = jax.tree_util.tree_map_with_path(
        lambda path, x: struct(x, NamedSharding(mesh, layout.parameter_spec(path, x))),
        abstract_params(config.model),
    )
    tx = build_optimizer(config, params, layout.placement)
    opt_state = jax.tree.map(
        struct, jax.eval_shape(tx.init, params), state_shardings(tx, params, mesh)
    )
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    state = TrainState(count, params, opt_state)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(model_structure(config.model), tx, config, layout, shardings)
    return step, state, abstract_batch(config, layout, config.data.batch_rows)


def abstract_batch(config: Config, layout: Layout, rows: int, length: int | None = None) -> Any:
    """Shapes of a batch of so many rows, of this length or training's, where they lie."""
    shape = (rows, length or config.model.sequence_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout.rows)
    return {"inputs": tokens, "targets": tokens}


def plan_run(config: Config, target: Target, largest: bool = False) -> dict[str, Any]:
    """Compiles training step and evaluation of a run for devices that need not be there.

    Args:
        config: the run. Without a mesh all devices of the target are its "data" axis.
        target: from `shampoo_jax.target_devices`.
        largest: whether to find the largest microbatch that fits, which takes more compilations.

    Returns:
        A record of JSON types, see docs/hardware.md: bytes and operations are those of one device.
    """
    config = dataclasses.replace(config, mesh=config.mesh or "data=-1")
    layout = make_layout(config, target.devices)
    assert layout is not None  # there is a mesh
    _, state, _ = abstract_step(config, layout)
    evaluation = make_eval_step(model_structure(config.model), config, layout)
    rows = abstract_batch(config, layout, config.data.microbatch_rows, config.data.val_length)
    programs = {
        "train": compile_train(config, layout, target),
        "evaluation": compile_for(target, evaluation, (state.params, rows, state.step)),
    }
    found = (
        {"largest_microbatch_rows": largest_microbatch(config, layout, target)} if largest else {}
    )
    return found | {
        "target": target.name,
        "devices": len(target.devices),
        "memory": target.memory,
        "run": config.name,
        "mesh": config.mesh,
        "batch_rows": config.data.batch_rows,
        "microbatch_rows": config.data.microbatch_rows,
        "parameters": _held(state.params),
        "optimizer_state": _held(state.opt_state),
        "jax": jax.__version__,
        "programs": {name: _record(program, target) for name, program in programs.items()},
    }


def compile_train(config: Config, layout: Layout, target: Target) -> Compiled:
    """Compiles the training step of a run."""
    step, state, batch = abstract_step(config, layout)
    return compile_for(target, step, (state, batch))


def largest_microbatch(config: Config, layout: Layout, target: Target) -> int:
    """Rows of the largest microbatch with which the training step fits; 0 where none does.

    Args:
        config: the run, whose batch stays as it is.
        layout: of the target's devices.
        target: whose memory counts.
    """
    rows = config.data.batch_rows
    shape = rows, config.model.sequence_length
    devices = rows // layout.rows.shard_shape(shape)[0]
    choices = [n for n in range(devices, rows + 1, devices) if rows % n == 0]

    def too_large(n: int) -> bool:
        data = dataclasses.replace(config.data, microbatch_rows=n)
        return compile_train(dataclasses.replace(config, data=data), layout, target).short > 0

    fitting = bisect.bisect_left(choices, True, key=too_large)
    return choices[fitting - 1] if fitting else 0


def _held(tree: Any) -> int:
    """Bytes of a tree on one device."""
    shapes = ((x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree))
    return sum(jnp.dtype(dtype).itemsize * math.prod(shape) for shape, dtype in shapes)


def _record(found: Compiled, target: Target) -> dict[str, Any]:
    fields = {k: v for k, v in vars(found).items() if k not in ("target", "program")}
    if found.program is None:
        return fields
    fields |= dataclasses.asdict(found.program) | {"peak": found.peak}
    kind = target.name.partition(":")[0]
    if kind in RATES:
        rates = DEVICES[RATES[kind]]
        seconds = predicted(found, rates, len(target.devices))
        best, worst = max(seconds.values()), sum(seconds.values()) / EFFICIENCY
        fields |= {"seconds": seconds, "best_s": best, "worst_s": worst, "rates": rates.source}
    return fields


def predicted(found: Compiled, rates: Rates, devices: int) -> dict[str, float]:
    """Seconds of products, of memory and of links at published rates.

    Every argument is read and every result written once, temporary memory both. Kernels without
    products in the program's text, cuDNN's attention and decompositions, are left out.

    Args:
        found: a program.
        rates: of one device.
        devices: how many there are.
    """
    program = found.program
    assert program is not None  # it fits
    touched = found.arguments + found.outputs + 2 * found.temporary
    link = rates.near if devices <= rates.node else rates.far
    return {
        "products": sum(n / _rate(kind, rates) for kind, n in program.flops.items()),
        "memory": touched / rates.memory,
        "links": sum(size for _, size in program.exchanges.values()) / link,
    }


def _rate(arithmetic: str, rates: Rates) -> float:
    """Operations a second of products in an arithmetic, as `shampoo_jax.Program` names it."""
    if arithmetic.startswith("bf16_bf16_f32_x3"):
        return rates.bfloat16 / 3
    if arithmetic.startswith(("bf16", "f16")):
        return rates.bfloat16
    if arithmetic.startswith("tf32"):
        return rates.rest
    # What is left to the platform is TF32 on a GPU and bfloat16 on a TPU.
    wide = {"highest": rates.full, "high": rates.rest}
    return wide.get(arithmetic.partition(" ")[2], rates.rest)
