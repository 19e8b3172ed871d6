"""What the commands do alike: errors in a line, and an end that says how to go on."""

import errno
import functools
import logging
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from nanogpt.train.interrupt import Interrupted, StopSignal

Main = Callable[[Sequence[str]], None]  # takes a command's words
# How TensorStore spells errors of the system that mean a full disk, a quota or a limit; what it
# says besides is a page long.
_NO_ROOM = re.compile(
    rf"os_error_code='({errno.ENOSPC}|{errno.EDQUOT}|{errno.EFBIG})'|RESOURCE_EXHAUSTED"
)
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
            # Of an error that it raises later, when the save is waited for, Orbax logs pages, and
            # TensorStore's arrays that fail behind the first one find no event loop any more.
            for name in ("absl", "asyncio"):
                logging.getLogger(name).addFilter(_is_news)
            if sys.unraisablehook is sys.__unraisablehook__:
                sys.unraisablehook = _unraisable
            try:
                function(words)
            except BrokenPipeError:  # `nanogpt.cli` ends without a word
                raise
            except (ValueError, OSError, *errors) as error:
                sys.exit(f"error: {_told(error)}")
            except ImportError as error:  # fsspec's, where a folder in gs:// is read
                if "gcsfs" not in str(error):
                    raise
                sys.exit(f"error: {error}: run `pip install gcsfs google-cloud-storage`.")
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


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message is more than the story of an error that is on its way here."""
    return not record.exc_info


def _unraisable(found: Any) -> None:
    """Shows errors that nobody can catch, but for those that follow one that is on its way here."""
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def _told(error: Exception) -> str:
    """The message of an error; that of a disk that is full says what to do."""
    text = str(error)
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename}: No such file or folder: see how its name is written"
    if _NO_ROOM.search(text):
        text = " ".join(text.split())[:200]
    elif getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return text
    remedy = "the disk is full: make room and repeat the command, a run's with --resume"
    return f"{text}; {remedy}"
