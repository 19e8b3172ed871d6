"""Lets the table of contents name pages that need not be there: patterns that match nothing."""

from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parents[1]


def drop_empty_patterns(app: Sphinx, docname: str, source: list[str]) -> None:
    """Removes the lines of the first page that are patterns without a page."""
    if docname == app.config.root_doc:
        lines = source[0].splitlines()
        source[0] = "\n".join(x for x in lines if "*" not in x or any(DOCS.glob(f"{x}.md")))


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers it."""
    app.connect("source-read", drop_empty_patterns)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
