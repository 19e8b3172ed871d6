"""What runs left in JSON, where it is not what this version writes: refused by its file's name."""

import contextlib
from collections.abc import Iterator

from nanogpt.train.paths import Path

# What code that expects another form stumbles over.
STUMBLES = (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


@contextlib.contextmanager
def expecting_form(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Turns what goes wrong with values of a file that have another form into a sentence.

    Args:
        path: the file, or a checkpoint's folder.
        *more: further errors that only values of the file can cause.

    Raises:
        ValueError: names the path and what to do.

    >>> import pathlib
    >>> with expecting_form(pathlib.Path("metrics.jsonl")):
    ...     {}["config"]
    Traceback (most recent call last):
    ValueError: metrics.jsonl is not as this version writes it (KeyError: 'config'): it was \
changed, or saved by another version. Put it back, or start anew under another --name.
    """
    try:
        yield
    except (*STUMBLES, *more) as error:
        raise ValueError(
            f"{path} is not as this version writes it ({type(error).__name__}: {error}): it was "
            "changed, or saved by another version. Put it back, or start anew under another --name."
        ) from error
