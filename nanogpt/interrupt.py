"""Stopping on request: Ctrl-C and SIGTERM end a run between two steps, not inside one."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A run was stopped by a signal after its state had been saved.

    Attributes:
        signum: the signal; a process that obeys it exits with 128 + signum.
        step: updates done, all of them in the checkpoint.
    """

    def __init__(self, signum: int, step: int, folder: str):
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after {step} steps; they are saved in "
            f"{folder}. Repeat the same command with --resume to go on (with make: ARGS=--resume)."
        )
        self.signum = signum
        self.step = step


class StopRequest:
    """Remembers the first signal asking to stop; the second one acts as if nobody listened."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        """Takes over SIGINT and SIGTERM."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._remember)

    def restore(self) -> None:
        """Gives both signals back to whoever had them."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        # A second Ctrl-C must be able to kill a run that hangs.
        self.restore()


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listens for SIGINT and SIGTERM while the block runs; main thread only.

    Yields:
        An object whose `signum` is None until a signal arrives.

    >>> import os
    >>> with stop_request() as request:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     request.signum == signal.SIGTERM
    True
    """
    request = StopRequest()
    request.listen()
    try:
        yield request
    finally:
        request.restore()
