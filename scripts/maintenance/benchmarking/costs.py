"""What XLA says about a compiled function."""

import time
from collections.abc import Callable
from typing import Any

import jax


def compile_function(
    function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()
) -> tuple[Callable[..., Any], dict[str, float]]:
    """Compiles ahead of time and reads XLA's accounts of the program.

    XLA counts neither the work inside a library's decomposition (eigh, QR) nor a loop's body more
    than once, and of a condition the dearer branch: compare FLOPs only where none of these matter.

    Args:
        function: To compile.
        *arguments: Arrays or their shape structs.
        donate: Positions whose buffers the function may reuse.

    Returns:
        The compiled function, and {"compile_s", "flops", "bytes", "peak_memory_bytes"}: seconds of
        tracing and compiling; floating-point operations and bytes moved by one call; arguments,
        results and temporaries together.
    """
    begin = time.perf_counter()
    compiled = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    seconds = time.perf_counter() - begin
    analysis: Any = compiled.cost_analysis() or {}
    memory: Any = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return compiled, {
        "compile_s": seconds,
        "flops": analysis.get("flops", 0.0),
        "bytes": analysis.get("bytes accessed", 0.0),
        "peak_memory_bytes": held + memory.temp_size_in_bytes,
    }
