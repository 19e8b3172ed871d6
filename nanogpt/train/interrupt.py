"""Stopping on request: signals end a run between two steps, with a checkpoint, not inside one."""

import contextlib
import signal
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[dict[int, Any]]:
    """Gives the signals that ask to stop to a handler while the block runs; main thread only.

    Yields:
        The handlers to be put back afterwards, by signal.
    """
    previous = {signum: signal.signal(signum, handler) for signum in stop_signals()}
    try:
        yield previous
    finally:
        for signum, before in previous.items():
            signal.signal(signum, before)


class StopSignal(SystemExit):
    """A signal asked to stop; who does not catch it exits with 128 + signum."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum


@contextlib.contextmanager
def exit_on_stop() -> Iterator[None]:
    """Turns a signal that asks to stop into `StopSignal` while the block runs.

    So everybody can clean up, as after a Ctrl-C.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        raise StopSignal(signum)

    with handling(stop):
        yield


class StopRequest:
    """Remembers the first signal asking to stop; the second one acts as if nobody listened.

    Not so SIGHUP, which a shell and the system may both send.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.previous: dict[int, Any] = {}  # handlers to be put back

    def remember(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler."""
        self.signum = signum
        # A second Ctrl-C must be able to kill a run that hangs.
        for other in (signal.SIGINT, signal.SIGTERM):
            if other in self.previous:
                signal.signal(other, self.previous.pop(other))


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
    with handling(request.remember) as request.previous:
        yield request
