"""Programs compiled for hardware that is not here, and what their compilers say of them."""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shampoo_jax.inspect.programs import Program, read_program
from shampoo_jax.inspect.targets import Target, target_devices
from shampoo_jax.stacks.placement import state_shardings


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler says of a program, on one device.

    Attributes:
      target: What it is compiled for.
      lower_s: Seconds from Python to a program that is not optimized.
      compile_s: Seconds of the compiler.
      cpu_s: Its processor time, all threads.
      arguments: Bytes that are given to the program.
      outputs: Bytes of results that are not written in place of arguments.
      temporary: Bytes used in between.
      program: What it does; None where it does not fit and the compiler gave up.
      short: Bytes that are missing where it does not fit; 0 where it does.

    Example:
      >>> import jax, jax.numpy as jnp, optax, shampoo_jax
      >>> params = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
      >>> found = shampoo_jax.compile_update(optax.sgd(0.1), params, "cpu:1")
      >>> found.short, found.peak >= found.arguments
      (0, True)
    """

    target: Target
    lower_s: float
    compile_s: float
    cpu_s: float
    arguments: int = 0
    outputs: int = 0
    temporary: int = 0
    program: Program | None = None
    short: int = 0

    @property
    def peak(self) -> int:
        """Bytes in use at a time, at most."""
        return self.arguments + self.outputs + self.temporary


def compile_for(
    target: Target,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    donated: tuple[int, ...] = (),
) -> Compiled:
    """Compiles a function for devices that need not be there; nothing is allocated or run.

    Args:
      target: See `target_devices`.
      function: Is traced as by `jax.jit`; one that is jitted keeps its options.
      arguments: Trees of `jax.ShapeDtypeStruct` with shardings on devices of the target.
      donated: Arguments that results may be written to.

    Example:
      >>> import jax, jax.numpy as jnp, shampoo_jax
      >>> target = shampoo_jax.target_devices("cpu:1")
      >>> here = jax.sharding.SingleDeviceSharding(target.devices[0])
      >>> x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=here)
      >>> compiled = shampoo_jax.compile_for(target, jnp.sin, [x])
      >>> compiled.arguments, compiled.outputs, compiled.short
      (16384, 16384, 0)
    """
    jitted: Any = function
    if not hasattr(function, "trace"):
        jitted = jax.jit(function, donate_argnums=donated)
    begin = time.perf_counter()
    lowered = jitted.trace(*arguments).lower(lowering_platforms=(target.platform,))
    lower_s = time.perf_counter() - begin
    begin, cpu = time.perf_counter(), time.process_time()

    def found(**fields: Any) -> Compiled:
        spent = time.perf_counter() - begin, time.process_time() - cpu
        return Compiled(target, lower_s, *spent, **fields)

    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        missing = _missing(str(error))
        if missing is None:
            raise
        return found(short=missing)
    memory = compiled.memory_analysis()
    assert memory is not None  # every compiler tells it for a whole program
    done = found(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
    )
    room = done.peak if target.memory is None else target.memory
    return dataclasses.replace(
        done, program=read_program(compiled.as_text() or ""), short=max(done.peak - room, 0)
    )


def _missing(error: str) -> int | None:
    """Bytes that a program exceeds a device's memory by, of a compiler's words; None for others."""
    found = re.search(r"Exceeded hbm capacity by ([\d.]+)([KMG])", error)
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return round(float(found[1]) * units[found[2]]) if found else None


def compile_update(
    tx: optax.GradientTransformation,
    params: Any,
    target: str | Target,
    *,
    mesh: Mesh | None = None,
    parameter_spec: Callable[..., P] | None = None,
) -> Compiled:
    """Compiles one update of any Optax optimizer for hardware that need not be there.

    Args:
      tx: The optimizer. One with a `Placement` has to have it on `mesh`.
      params: Parameters, or their shapes.
      target: A name as for `target_devices`, or what that returned.
      mesh: Of devices of the target; None for one axis `"data"` of all.
      parameter_spec: Function (path, leaf) -> spec; None for parameters whole on every device.

    Returns:
      What the compiler says. Gradients and state are donated.

    Example:
      >>> import jax, jax.numpy as jnp, optax, shampoo_jax
      >>> params = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
      >>> found = shampoo_jax.compile_update(optax.adam(1e-3), params, "cpu:1")
      >>> found.program.exchanges, found.short
      ({}, 0)
    """
    target = target_devices(target) if isinstance(target, str) else target
    if mesh is None:
        devices = np.array(target.devices)
        mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))

    def struct(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    placed = jax.tree_util.tree_map_with_path(
        lambda path, x: struct(
            x, NamedSharding(mesh, parameter_spec(path, x) if parameter_spec else P())
        ),
        params,
    )
    state = jax.tree.map(struct, jax.eval_shape(tx.init, placed), state_shardings(tx, placed, mesh))
    return compile_for(target, tx.update, (placed, state, placed), donated=(0, 1))
