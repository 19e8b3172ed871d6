"""The timing rule, the same for every optimizer and framework; imports neither jax nor torch."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Times(NamedTuple):
    """Seconds of a call, one figure a round."""

    wall: tuple[float, ...]  # mean over the calls of a round
    cpu: tuple[float, ...]  # likewise, of all threads of this process
    slowest: tuple[float, ...]  # wall time of a round's slowest call

    def summary(self) -> dict[str, float]:
        """Medians over the rounds, and the least mean."""
        return {
            "step_s": statistics.median(self.wall),
            "cpu_s": statistics.median(self.cpu),
            "slowest_s": statistics.median(self.slowest),
            "least_s": min(self.wall),
            "least_cpu_s": min(self.cpu),
        }


def time_calls(
    call: Callable[[Any], None],
    prepare: Callable[[int], Any],
    *,
    rounds: int,
    calls: int = 1,
    warmup: int = 1,
    wall: Callable[[], float] = time.perf_counter,
    cpu: Callable[[], float] = time.process_time,
) -> Times:
    """Times a function whose cost may vary from call to call with a period.

    Args:
        call: Function to time; returns when its work is done, device included.
        prepare: Makes the argument of call i, off the clock; returns when that is done.
        rounds: How many means are taken.
        calls: Calls a round: the period, so that every round does the same work.
        warmup: Calls before the first round.
        wall: Clock of real seconds.
        cpu: Clock of processor seconds.

    Returns:
        Seconds a call.

    >>> ticks = iter([0.0, 1.0, 5.0, 8.0])
    >>> times = time_calls(
    ...     print, str, rounds=1, calls=2, wall=lambda: next(ticks), cpu=lambda: 0.0
    ... )
    0
    1
    2
    >>> times.wall, times.slowest
    ((2.0,), (3.0,))
    """
    for i in range(warmup):
        call(prepare(i))
    means, slowest = [], []
    for first in range(warmup, warmup + rounds * calls, calls):
        spent = []
        for i in range(first, first + calls):
            argument = prepare(i)
            begin = wall(), cpu()
            call(argument)
            spent.append((wall() - begin[0], cpu() - begin[1]))
        means.append([sum(column) / calls for column in zip(*spent, strict=True)])
        slowest.append(max(seconds for seconds, _ in spent))
    walls, cpus = zip(*means, strict=True)
    return Times(walls, cpus, tuple(slowest))
