"""How a part hands over what it measured: one line of JSON a figure, at once.

A line is written whole and flushed, so a part that is ended in the middle of the next measurement
has lost nothing. Only the standard library is used here: the process that reads must not touch the
device.
"""

import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

Figures = dict[str, list[dict[str, Any]]]


class Recorder:
    """Writes the figures of one part.

    Args:
        path: File to append to.
        seconds: What the part may take, from now on.
        clock: Of seconds.
    """

    def __init__(
        self,
        path: pathlib.Path,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._path, self._clock = path, clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds that the part still has; negative when it should have stopped."""
        return self._end - self._clock()

    def add(self, group: str, **figures: Any) -> None:
        """Records one row of a group."""
        line = json.dumps({"group": group, **figures}, default=float)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def attempt(self, group: str, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Records what `measure` returns, its error if it has one, or that its time was over.

        One measurement's failure must not cost the part's other figures.
        """
        if self.left() <= 0:
            self.add(group, name=name, error="not measured: the part's time was over")
            return
        try:
            figures = measure()
        except Exception as error:
            figures = {"error": describe(error)}
        self.add(group, name=name, **figures)


def describe(error: BaseException) -> str:
    """The kind and the first lines of an error: XLA's go on for pages.

    >>> describe(ValueError("x=3: must be 2."))
    'ValueError: x=3: must be 2.'
    """
    text = str(error).strip()[:600]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def read(path: pathlib.Path) -> Figures:
    """The rows of a part by group; a last line that was cut off is left out."""
    figures: Figures = {}
    for row in _rows(path):
        figures.setdefault(row.pop("group"), []).append(row)
    return figures


def _rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
