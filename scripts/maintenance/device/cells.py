"""What the report's page is made of: rows of figures, cells, and lists of errors."""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.maintenance.device.budget import PARTS

Rows = Sequence[Mapping[str, Any]]
Result = Mapping[str, Any]


def rows(result: Result, part: str, group: str) -> Rows:
    """What a part measured in a group; nothing if it did not."""
    return result["parts"].get(part, {}).get("figures", {}).get(group, [])


def named(result: Result, part: str, group: str, name: str) -> Mapping[str, Any]:
    """One row by name; empty if it is missing or has an error."""
    found = (r for r in rows(result, part, group) if r.get("name") == name and "error" not in r)
    return next(found, {})


def device_of(result: Result) -> Mapping[str, Any]:
    """The device as the first part that knows it has it; empty if none does."""
    found = (row for name in PARTS for row in rows(result, name.name, "device"))
    return next(found, {})


def cell(text: str) -> str:
    """Text that stays within a cell of a table."""
    return " ".join(text.split()).replace("|", "/")[:200]


def errors(found: Rows) -> str:
    """A list of what failed in a group, or nothing."""
    failed = [f"* {r['name']}: {cell(r['error'])}" for r in found if "error" in r]
    return "Not measured:\n\n" + "\n".join(failed) if failed else ""


def join(*pieces: str) -> str:
    """Paragraphs, without those that are empty."""
    return "\n\n".join(piece for piece in pieces if piece)
