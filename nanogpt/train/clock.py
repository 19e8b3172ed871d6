"""The training clock: what a step costs, validation and checkpoints left out."""

import statistics
import time
from collections.abc import Callable


class StepClock:
    """Adds up the time between the ends of consecutive steps.

    A lap ends when a step's result has arrived. The loop keeps one step in flight, so a lap is the
    rate at which steps leave the device, with no stall added by the measurement. After a pause
    `start` forgets the time since the last lap.

    The benchmark's clock stops for validation, too. It runs on while the first step compiles; here
    steps are compiled before. Fetching batches counts in both.

    Args:
        elapsed: seconds of training that an earlier process has already done.
        now: monotonic clock, in seconds.

    >>> ticks = iter([10.0, 11.0, 13.0])
    >>> clock = StepClock(now=lambda: next(ticks))
    >>> clock.start(); clock.lap(); clock.lap()
    1.0
    2.0
    >>> clock.elapsed, clock.median()
    (3.0, 1.5)
    """

    def __init__(self, elapsed: float = 0.0, now: Callable[[], float] = time.perf_counter):
        self.elapsed = elapsed
        self.laps: list[float] = []
        self._now = now
        self._last = 0.0

    def start(self) -> None:
        """Starts, or restarts after work that is not training."""
        self._last = self._now()

    def lap(self) -> float:
        """Ends a step; returns its seconds."""
        now = self._now()
        lap, self._last = now - self._last, now
        self.laps.append(lap)
        self.elapsed += lap
        return lap

    def recent(self, count: int) -> float:
        """Returns the mean seconds of the last `count` laps."""
        return statistics.fmean(self.laps[-count:])

    def median(self) -> float | None:
        """Returns the median seconds of a lap, None before the first."""
        return statistics.median(self.laps) if self.laps else None
