"""The tables of docs/hardware.md."""

import pathlib
from typing import Any


def write_tables(path: pathlib.Path, rows: dict[str, dict[str, Any]]) -> None:
    """Writes tables between the marks of the page."""
