"""Docstrings write `name` and `formula` alike in single backticks, as Markdown does.

As Sphinx's default role this shows both as code, and makes a link of what is a public name:
`Refresh`, `Refresh(stagger=True)`, `presets.track3`, `matrix.eigh.truncated_root`.
"""

import re
from typing import Any

from docutils import nodes
from docutils.parsers.rst import roles
from sphinx import addnodes
from sphinx.application import Sphinx

from docs._site.public import PUBLIC

CALL = re.compile(r"([A-Za-z_][\w.]*)(\(.*\))?", re.DOTALL)


def target_of(text: str) -> str | None:
    """The public name that a piece of code is, or calls."""
    m = CALL.fullmatch(text)
    return PUBLIC.get(m[1]) or PUBLIC.get(m[1].rpartition(".")[2]) if m else None


def code(name: str, rawtext: str, text: str, lineno: int, inliner: Any, *_: Any) -> Any:
    """A role: literal text, linked where it is a public name."""
    literal = nodes.literal(rawtext, text)
    target = target_of(text)
    if target is None:
        return [literal], []
    reference = addnodes.pending_xref(
        rawtext, literal, refdomain="py", reftype="obj", reftarget=target, refexplicit=True
    )
    reference["refdoc"] = inliner.document.settings.env.docname
    return [reference], []


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the role under the name that conf.py makes the default."""
    roles.register_local_role("code_or_name", code)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
