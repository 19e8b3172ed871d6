"""Compiling many programs at once, and timing one of them on an accelerator."""

import concurrent.futures
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from scripts.benchmarking.costs import compile_function


class Program(NamedTuple):
    """What is to be compiled.

    Attributes:
        function: of arrays.
        arguments: arrays or their shape structs.
        donate: positions whose buffers the function may reuse.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donate: tuple[int, ...] = ()


class Compiled(NamedTuple):
    """A program to call, and XLA's accounts of it; or the error that it has instead."""

    call: Callable[..., Any] | None
    costs: dict[str, float]
    error: str | None = None


def compile_all(programs: Mapping[str, Program], seconds: float) -> dict[str, Compiled]:
    """Compiles programs in as many threads as there are cores, and waits for all of them.

    Nothing may be timed while the compiler tries kernels on the device, hence the wait. A program
    that is not ready in time is left behind: its thread goes on, and whatever is timed then is
    disturbed, which its error says.

    Args:
        programs: By name.
        seconds: To wait at most.

    Returns:
        One entry a program.
    """
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

    def one(program: Program) -> Compiled:
        function, arguments, donate = program
        return Compiled(*compile_function(function, *arguments, donate=donate))

    futures = {name: pool.submit(one, program) for name, program in programs.items()}
    concurrent.futures.wait(futures.values(), timeout=max(seconds, 0.0))
    pool.shutdown(wait=False, cancel_futures=True)
    return {name: _result(future, seconds) for name, future in futures.items()}


def _result(future: "concurrent.futures.Future[Compiled]", seconds: float) -> Compiled:
    if not future.done() or future.cancelled():
        return Compiled(None, {}, f"not compiled in {seconds:.0f} s")
    error = future.exception()
    if error is not None:
        return Compiled(None, {}, f"{type(error).__name__}: {str(error)[:300]}")
    return future.result()


def ready(compiled: Compiled) -> Callable[..., Any]:
    """The program to call.

    Raises:
        RuntimeError: it could not be compiled, or not in time.
    """
    if compiled.call is None:
        raise RuntimeError(compiled.error)
    return compiled.call


def seconds_per_call(
    call: Callable[[int], Any],
    *,
    rounds: int,
    calls: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median over rounds of the time of a call, without waiting for the device between calls.

    An accelerator's queue hides what the host needs to begin a call, as it does in training.

    Args:
        call: Of a running number; returns arrays that are ready when its work is done.
        rounds: How many means are taken.
        calls: Calls a round: a multiple of the period of the cost.
        warmup: Calls before the first round.
        clock: Of seconds.

    Returns:
        Seconds.
    """
    numbers = iter(range(warmup + rounds * calls))
    result = None
    for _ in range(warmup):
        result = call(next(numbers))
    jax.block_until_ready(result)
    means = []
    for _ in range(rounds):
        begin = clock()
        for _ in range(calls):
            result = call(next(numbers))
        jax.block_until_ready(result)
        means.append((clock() - begin) / calls)
    return statistics.median(means)


def on_gpu() -> bool:
    """Tells whether the programs run on a GPU."""
    return jax.default_backend() == "gpu"
