"""Stopping on request: signals end a run between two steps, with a checkpoint, not inside one."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any

_END = b"\0"  # no signal has this number


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
    """Remembers the first signal asking to stop; the second one ends the process.

    Not so SIGHUP, which a shell and the system may both send. While the main thread is inside of
    XLA, it hears nothing for minutes: another thread answers at once.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def remember(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler."""
        self.signum = signum
        # A second Ctrl-C must be able to kill a run that hangs, inside of XLA too.
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, signal.SIG_DFL)

    def answer(self, reader: int, signals: Collection[int]) -> None:
        """Tells whoever sent a signal what becomes of it; every signal arrives here as a byte."""
        heard = 0
        while (byte := os.read(reader, 1)) != _END:
            signum = signal.Signals(byte[0])
            heard += signum in signals
            if signum in signals and heard == 1:
                print(
                    f"\n{signum.name}: stops after the step, or the compilation, that it is at, "
                    "and saves its state; once more ends it at once",
                    file=sys.stderr,
                    flush=True,
                )
            elif signum in (signal.SIGINT, signal.SIGTERM) and self.signum is None:
                # The main thread has not come to hear of the first one yet.
                os._exit(128 + signum)
        os.close(reader)


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listens for signals that ask to stop while the block runs; main thread only.

    Yields:
        An object whose `signum` is None until a signal arrives.

    >>> with stop_request() as request:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     request.signum == signal.SIGTERM
    True
    """
    request = StopRequest()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with handling(request.remember) as previous:
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=request.answer, args=(reader, set(previous)), daemon=True)
        thread.start()
        try:
            yield request
        finally:
            signal.set_wakeup_fd(before)
            os.write(writer, _END)
            os.close(writer)
            thread.join()
