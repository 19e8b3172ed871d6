"""What the commands do alike: errors in a line, and an end that says how to go on."""

import functools
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from nanogpt.train.interrupt import Interrupted, StopSignal


class Main(Protocol):
    """What a subcommand's module calls main."""

    def __call__(self, arguments: Sequence[str] | None = None) -> None:
        """Runs the command line."""


GOES_ON = "stopped; the same command goes on from here"


def command(*errors: type[Exception], stopped: str) -> Callable[[Callable], Main]:
    """Makes a subcommand of a function of its arguments.

    Args:
        *errors: what ends it with a line instead of a traceback, beside wrong values and files.
        stopped: what is said after a signal that asks to stop; the status is 128 + the signal.

    Returns:
        Decorator; what it returns takes the process's arguments where it is given none.
    """

    def wrap(function: Callable[[Sequence[str]], None]) -> Main:
        @functools.wraps(function)
        def main(arguments: Sequence[str] | None = None) -> None:
            try:
                function(sys.argv[1:] if arguments is None else arguments)
            except BrokenPipeError:  # `nanogpt.cli` ends without a word
                raise
            except (ValueError, OSError, *errors) as error:
                sys.exit(f"error: {error}")
            except (Interrupted, StopSignal, KeyboardInterrupt) as signalled:
                print(stopped, file=sys.stderr)
                sys.exit(128 + getattr(signalled, "signum", signal.SIGINT))

        return main

    return wrap
