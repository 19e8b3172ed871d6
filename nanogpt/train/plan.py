"""What a run would be on devices that are not here: its programs, compiled from shapes alone."""

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanogpt.config.run import Config
from nanogpt.optimizers.build import build_optimizer
from nanogpt.train.mesh import Layout, make_layout
from nanogpt.train.predicted import predicted
from nanogpt.train.train_step import (
    TrainState,
    abstract_params,
    at_step,
    make_eval_step,
    make_gradients,
    make_train_step,
    model_structure,
)
from shampoo_jax import Compiled, Target, compile_for, state_shardings

# What can be compiled of a run; "update" is the optimizer alone, for compilers that take minutes.
PROGRAMS = ("train", "gradients", "update", "evaluation")
USUAL = ("train", "gradients", "evaluation")


def abstract_state(config: Config, layout: Layout) -> tuple[Any, TrainState]:
    """The optimizer of a run, and shapes of its state where they lie.

    Args:
        config: the run.
        layout: on devices of any kind; nothing is computed.
    """
    mesh = layout.mesh
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: _struct(x, NamedSharding(mesh, layout.parameter_spec(path, x))),
        abstract_params(config.model),
    )
    tx = build_optimizer(config, params, layout.placement)
    opt_state = jax.tree.map(
        _struct, jax.eval_shape(tx.init, params), state_shardings(tx, params, mesh)
    )
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    return tx, TrainState(count, params, opt_state)


def _struct(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def abstract_step(config: Config, layout: Layout) -> tuple[Any, TrainState, Any]:
    """The jitted training step of a run, and shapes of its state and batch where they lie."""
    tx, state = abstract_state(config, layout)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(model_structure(config.model), tx, config, layout, shardings)
    return step, state, abstract_batch(config, layout, config.data.batch_rows)


def abstract_batch(config: Config, layout: Layout, rows: int, length: int | None = None) -> Any:
    """Shapes of a batch of so many rows, of this length or training's, where they lie."""
    shape = (rows, length or config.model.sequence_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout.rows)
    return {"inputs": tokens, "targets": tokens}


def plan_run(
    config: Config, target: Target, programs: Sequence[str] = USUAL, largest: bool = False
) -> dict[str, Any]:
    """Compiles a run's programs for devices that need not be there.

    Args:
        config: the run. Without a mesh all devices of the target are its "data" axis.
        target: from `shampoo_jax.target_devices`.
        programs: which of `PROGRAMS`.
        largest: whether to find the largest microbatch that fits, which takes more compilations.

    Returns:
        A record of JSON types, see docs/hardware.md: bytes and operations are those of one device.
    """
    config = dataclasses.replace(config, mesh=config.mesh or "data=-1")
    layout = make_layout(config, target.devices)
    assert layout is not None  # there is a mesh
    tx, state = abstract_state(config, layout)
    done = {name: compile_program(name, config, layout, target, tx, state) for name in programs}
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
        "temporary": split(done, state.params, layout),
        "jax": jax.__version__,
        "programs": {name: _record(program, target) for name, program in done.items()},
    }


def compile_program(
    name: str, config: Config, layout: Layout, target: Target, tx: Any, state: TrainState
) -> Compiled:
    """Compiles one of `PROGRAMS`."""
    structure, params = model_structure(config.model), state.params
    batch = abstract_batch(config, layout, config.data.batch_rows)
    if name == "train":
        return compile_train(config, layout, target)
    if name == "evaluation":
        piece = abstract_batch(config, layout, config.data.microbatch_rows, config.data.val_length)
        evaluate = make_eval_step(structure, config, layout)
        return compile_for(target, evaluate, (params, piece, state.step))
    gradients = make_gradients(structure, config, layout)
    if name == "gradients":
        # What an optimizer keeps of each microbatch is its own affair.
        both = lambda p, b, s: gradients(p, at_step(b, config, s))[:2]  # noqa: E731
        return compile_for(target, both, (params, batch, state.step))
    spec = layout.gradient_spec if layout.scatter_gradients else layout.parameter_spec
    grads = jax.tree_util.tree_map_with_path(
        lambda path, x: _struct(x, NamedSharding(layout.mesh, spec(path, x))), params
    )
    return compile_for(target, tx.update, (grads, state.opt_state, params), donated=(0, 1))


def split(programs: Mapping[str, Compiled], params: Any, layout: Layout) -> dict[str, int]:
    """What the temporary memory of a step is for, as far as the programs tell.

    Activations are what the compiler gives forward and backward pass when they are compiled without
    an optimizer, less the float32 sums of gradients: also workspace of kernels, and with what it
    computes twice taken into account. `optimizer` is what the whole step takes more, which is
    little where that memory is free again before the optimizer's turn.

    Args:
        programs: of the run.
        params: shapes where they lie.
        layout: of both.
    """
    train, gradients = programs.get("train"), programs.get("gradients")
    if gradients is None or gradients.program is None:
        return {}
    sums = _held(jax.tree.map(lambda x: x.update(dtype=jnp.float32), params))
    # Where each device keeps a part of the sums, they are temporary; otherwise they are the result.
    taken = gradients.temporary + (0 if layout.scatter_gradients else gradients.outputs)
    found = {"activations": max(taken - sums, 0), "gradient_sums": sums}
    if train is None or train.program is None:
        return found
    return found | {"optimizer": max(train.temporary - gradients.temporary, 0)}


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
    return fields | predicted(found, target.name.partition(":")[0], len(target.devices))
