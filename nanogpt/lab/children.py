"""Running a command in a process of its own, which a Ctrl-C reaches once."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

from nanogpt.train.interrupt import stop_signals


def run_child(command: Sequence[str]) -> None:
    """Runs a command to its end; ends this process, too, if that one fails or is stopped.

    Args:
        command: program and arguments.

    Raises:
        SystemExit: the child's exit status, or 128 + the signal that stopped it.
    """
    with _forwarded_signals() as forward:
        # In a process group of its own, the child gets a Ctrl-C once, from us, and not twice.
        forward.child = subprocess.Popen(command, process_group=0)
        code = forward.child.wait()
    if forward.signum is not None:
        sys.exit(128 + forward.signum)
    if code:
        sys.exit(code if code > 0 else 128 - code)


class _Forward:
    """Passes signals on to a child process, and remembers the last one."""

    def __init__(self) -> None:
        self.child: subprocess.Popen | None = None
        self.signum: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        if self.child is not None:
            self.child.send_signal(signum)


@contextlib.contextmanager
def _forwarded_signals() -> Iterator[_Forward]:
    """Gives the signals that ask to stop to a child process while the block runs."""
    forward = _Forward()
    previous = {signum: signal.signal(signum, forward) for signum in stop_signals()}
    try:
        yield forward
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
