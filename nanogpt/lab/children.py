"""Running a command in a process of its own, which a Ctrl-C reaches once."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from nanogpt.train.interrupt import stop_signals

_VARIABLE = "NANOGPT_PARENT"  # file descriptor of the pipe that the parent holds open


def run_child(command: Sequence[str]) -> None:
    """Runs a command to its end; ends this process, too, if that one fails or is stopped.

    Args:
        command: program and arguments.

    Raises:
        SystemExit: the child's exit status, or 128 + the signal that stopped it.
    """
    # Whatever ends this process closes the pipe, which the child waits for.
    reader, writer = os.pipe()
    with _forwarded_signals() as forward:
        # In a process group of its own, the child gets a Ctrl-C once, from us, and not twice.
        forward.child = subprocess.Popen(
            command,
            process_group=0,
            pass_fds=(reader,),
            env={**os.environ, _VARIABLE: str(reader)},
        )
        os.close(reader)
        code = forward.child.wait()
    os.close(writer)
    if forward.signum is not None:
        sys.exit(128 + forward.signum)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def end_with_parent() -> None:
    """Ends this process as soon as the `run_child` that started it is gone, SIGKILL included.

    What it works on may be started anew by then. Without such a parent this does nothing.
    """
    told = os.environ.pop(_VARIABLE, None)  # not for children of this process
    if told is None:
        return
    reader = int(told)

    def wait() -> None:
        os.read(reader, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


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
