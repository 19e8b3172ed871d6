"""Stopping on request: signals end a run between two steps, with a checkpoint, not inside one."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
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


class StopRequest:
    """Remembers the first signal asking to stop; the second one ends the process.

    Not so SIGHUP, which a shell and the system may both send. While the main thread is inside of
    XLA, it hears nothing for minutes: another thread answers at once.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        """Takes over the signals that ask to stop."""
        for signum in stop_signals():
            self._previous[signum] = signal.signal(signum, self._remember)
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        arguments = (reader, list(self._previous))
        self._thread = threading.Thread(target=self._answer, args=arguments, daemon=True)
        self._thread.start()

    def restore(self) -> None:
        """Gives the signals back to whoever had them."""
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._writer, _END)
        os.close(self._writer)
        self._thread.join()
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _answer(self, reader: int, signals: list[int]) -> None:
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

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        # A second Ctrl-C must be able to kill a run that hangs, inside of XLA too.
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, signal.SIG_DFL)


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
