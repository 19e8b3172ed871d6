"""Tables and pages in Markdown."""

import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

LONGEST = 24  # letters of a name in a picture
PAGES = pathlib.Path(__file__).parent / "pages"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Returns a table whose first columns are text and whose others are figures.

    >>> print(markdown(["run", "loss"], [["a", "3.1"]]))
    | run | loss |
    | - | -: |
    | a | 3.1 |
    """
    lines = [head, ["-"] * texts + ["-:"] * (len(head) - texts), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(columns: Mapping[str, Callable[[Any], str]], rows: Iterable[Any]) -> str:
    """Returns a table of {title: function from a row to its cell}."""
    return markdown(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def shown(value: float | None, form: str, scale: float = 1.0) -> str:
    """Returns value * scale in a format, "-" where there is no value or none that is finite.

    >>> shown(0.1523, ".0f", 1e3), shown(None, ".0f")
    ('152', '-')
    """
    return "-" if value is None or not math.isfinite(value) else format(value * scale, form)


def printable(text: str) -> str:
    r"""The text with a mark in the place of each letter that cannot be printed.

    >>> printable("a\tb")
    'a�b'
    """
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def shorten(text: str, longest: int = LONGEST) -> str:
    """Takes out of the middle what is too long, and what cannot be printed.

    >>> shorten("Muon runs/long/name/seed-1", 16)
    'Muon run…/seed-1'
    """
    text = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[1 - longest // 2 :]}"


def page(name: str, **values: Any) -> str:
    """Returns a page of the folder `pages` with values in the place of their {names}."""
    return (PAGES / f"{name}.md").read_text(encoding="utf-8").format(**values)
