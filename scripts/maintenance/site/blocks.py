"""Fenced blocks of Markdown pages: found, run, and compared with what a page says they print.

A `text` block right behind a `python` block is what the latter prints; `...` in it stands for
anything. The blocks of a page run from top to bottom in one namespace, as a reader would.
"""

import contextlib
import doctest
import io
import re
from pathlib import Path
from typing import Any, NamedTuple


class Block(NamedTuple):
    """A fenced block: its language, the line of its fence, its text, the page that has it."""

    language: str
    line: int
    text: str
    page: str = ""


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"\s*^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def fenced_blocks(markdown: str, page: str = "") -> list[Block]:
    """Splits out the blocks between ``` fences."""
    return [
        Block(m[1], markdown.count("\n", 0, m.start()) + 1, m[2], page)
        for m in FENCED.finditer(markdown)
    ]


def run(block: Block, path: Path, namespace: dict[str, Any]) -> str:
    """Runs a Python block and returns what it prints; tracebacks name the page's own line."""
    padded = "\n" * block.line + block.text
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(padded, str(path), "exec"), namespace)
    return printed.getvalue()


def run_page(path: Path) -> int:
    """Runs the Python blocks of a page one after the other.

    Returns:
        Their number.

    Raises:
        AssertionError: A block does not print what the `text` block behind it says.
    """
    markdown = path.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    number = 0
    for m in FENCED.finditer(markdown):
        if m[1] != "python":
            continue
        number += 1
        line = markdown.count("\n", 0, m.start()) + 1
        got = run(Block(m[1], line, m[2]), path, namespace)
        said = PRINTED.match(markdown, m.end())
        if said and not doctest.OutputChecker().check_output(said[1], got, SAME):
            raise AssertionError(
                f"{path}:{line}: the page says that this block prints\n{said[1]}but it prints\n"
                f"{got}mend the block or the page"
            )
    return number
