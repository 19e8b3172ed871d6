"""Stopping on request: signals end a run between two steps, with a checkpoint, not inside one."""

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


def stop_signals() -> list[int]:
    """Returns the signals that ask to stop: SIGINT, SIGTERM and, except under nohup, SIGHUP.

    SIGHUP is what a closed terminal or a lost connection sends.
    """
    hung_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hung_up]


class StopRequest:
    """Remembers the first signal asking to stop; the second one acts as if nobody listened.

    Not so SIGHUP, which a shell and the system may both send.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        """Takes over the signals that ask to stop."""
        for signum in stop_signals():
            self._previous[signum] = signal.signal(signum, self._remember)

    def restore(self) -> None:
        """Gives the signals back to whoever had them."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        # A second Ctrl-C must be able to kill a run that hangs.
        for other in (signal.SIGINT, signal.SIGTERM):
            if other in self._previous:
                signal.signal(other, self._previous.pop(other))


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listens for signals that ask to stop while the block runs; main thread only.

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
