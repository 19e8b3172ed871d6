"""Compiling many programs at once, and timing one of them on an accelerator."""

import concurrent.futures
import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from scripts.maintenance.benchmarking.costs import compile_function

COMPILE_SHARE = 0.6  # of the time that is left; the rest is for what is ready by then
SLOW_S = 0.25  # a call that takes longer is timed less often


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
    error: BaseException | None = None


def compile_all(programs: Mapping[str, Program], seconds: float) -> dict[str, Compiled]:
    """Compiles programs in as many threads as there are cores, and waits for all of them.

    Nothing may be timed while the compiler tries kernels on the device, hence the wait. A program
    that is not ready in time is left behind; its thread goes on and may disturb what is timed.

    Args:
        programs: By name.
        seconds: That are left for compiling and measuring.

    Returns:
        One entry a program.
    """
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

    def one(program: Program) -> Compiled:
        function, arguments, donate = program
        return Compiled(*compile_function(function, *arguments, donate=donate))

    futures = {name: pool.submit(one, program) for name, program in programs.items()}
    patience = max(seconds, 0.0) * COMPILE_SHARE
    concurrent.futures.wait(futures.values(), timeout=patience)
    pool.shutdown(wait=False, cancel_futures=True)
    return {name: _result(future, patience) for name, future in futures.items()}


def _result(future: "concurrent.futures.Future[Compiled]", seconds: float) -> Compiled:
    if not future.done() or future.cancelled():
        return Compiled(None, {}, TimeoutError(f"not compiled in {seconds:.0f} s"))
    error = future.exception()
    return future.result() if error is None else Compiled(None, {}, error)


def ready(compiled: Compiled) -> Callable[..., Any]:
    """The program to call.

    Raises:
        BaseException: what compiling it ended with, or that it was not ready in time.
    """
    if compiled.error is not None:
        raise compiled.error
    assert compiled.call is not None
    return compiled.call


def seconds_per_call(
    call: Callable[[int], Any],
    *,
    rounds: int,
    calls: int,
    period: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median over rounds of the time of a call, without waiting for the device between calls.

    An accelerator's queue hides what the host needs to begin a call, as it does in training.

    Args:
        call: Of a running number; returns arrays that are ready when its work is done.
        rounds: How many means are taken.
        calls: Calls a round: a multiple of the period.
        period: Of the cost. Calls that are slow are timed over one period only, once.
        clock: Of seconds.

    Returns:
        Seconds.
    """
    numbers = itertools.count()
    jax.block_until_ready(call(next(numbers)))
    begin = clock()
    jax.block_until_ready(call(next(numbers)))
    if clock() - begin > SLOW_S:
        rounds, calls = 1, period
    means = []
    for _ in range(rounds):
        begin = clock()
        for _ in range(calls - 1):
            call(next(numbers))
        jax.block_until_ready(call(next(numbers)))
        means.append((clock() - begin) / calls)
    return statistics.median(means)


def on_gpu() -> bool:
    """Tells whether the programs run on a GPU."""
    return jax.default_backend() == "gpu"
