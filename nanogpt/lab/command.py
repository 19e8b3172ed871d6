"""What the commands do alike: errors in a line, and an end that says how to go on."""

import errno
import functools
import signal
import sys
from collections.abc import Callable, Sequence

import tyro

from nanogpt.train.interrupt import Interrupted, StopSignal

Main = Callable[[Sequence[str]], None]  # takes a command's words
GOES_ON = "stopped; the same command goes on from here"


def command(*errors: type[Exception], stopped: str = "stopped") -> Callable[[Main], Main]:
    """Makes a subcommand of a function of its words.

    Args:
        *errors: what ends it with a line instead of a traceback, beside wrong values and files.
        stopped: what is said after a signal that asks to stop; the status is 128 + the signal.
    """

    def wrap(function: Main) -> Main:
        @functools.wraps(function)
        def main(words: Sequence[str]) -> None:
            try:
                function(words)
            except BrokenPipeError:  # `nanogpt.cli` ends without a word
                raise
            except (ValueError, OSError, *errors) as error:
                full = getattr(error, "errno", None) == errno.ENOSPC
                remedy = "the disk is full: make room and repeat the command, a run's with --resume"
                sys.exit(f"error: {error}" + f"; {remedy}" * full)
            except (Interrupted, StopSignal, KeyboardInterrupt) as signalled:
                print(stopped, file=sys.stderr)
                sys.exit(128 + getattr(signalled, "signum", signal.SIGINT))

        return main

    return wrap


def flags(function: Callable[..., None]) -> Main:
    """Makes a function of words of one whose arguments are the flags of its command."""

    @functools.wraps(function)
    def read(words: Sequence[str]) -> None:
        tyro.cli(function, prog=f"nanogpt {function.__name__}", args=words)

    return read
