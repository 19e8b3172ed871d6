"""What pages write for GitHub, in the site: links out of docs/, and pictures for dark pages."""

import os
import re
from pathlib import Path
from typing import Any

from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
PAGES = {ROOT / "README.md": "project", ROOT / "CHANGELOG.md": "changelog"}
PICTURE = re.compile(
    r"<picture>\s*<source\s[^>]*srcset=\"([^\"]+)\"[^>]*>\s*<img\s([^>]*)>\s*</picture>"
)
ATTRIBUTE = re.compile(r"(\w+)=\"([^\"]*)\"")


def themed(m: re.Match[str]) -> str:
    """Two images, of which the theme shows the one that fits the page.

    The theme has a switch of its own, so what the browser prefers does not decide.
    """
    attributes = dict(ATTRIBUTE.findall(m[2]))
    width = f" width={attributes['width']}px" if "width" in attributes else ""
    return "\n".join(
        f"![{attributes['alt']}]({path}){{.only-{page}{width}}}"
        for page, path in (("light", attributes["src"]), ("dark", m[1]))
    )


def replace_pictures(app: Sphinx, docname: str, source: list[str]) -> None:
    """Makes Markdown of each `<picture>` of a page."""
    source[0] = PICTURE.sub(themed, source[0])


def replace_included(app: Sphinx, path: Path, docname: str, source: list[str]) -> None:
    """Likewise in a file that a page includes."""
    replace_pictures(app, docname, source)


class LinksOutOfDocs(SphinxTransform):
    """README and changelog are pages here; a folder of the repository is no page, so no link.

    Other files of the repository that a page links to come with the site, as downloads.
    """

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        """Replaces the links of one page that lead out of docs/."""
        for link in list(self.document.findall(addnodes.pending_xref)):
            path = self._path(link)
            if path is None or not path.exists() or (path.is_file() and DOCS in path.parents):
                continue
            if path in PAGES:
                anchor = link.get("reftargetid") or link["reftarget"].partition("#")[2] or None
                link["refdomain"], link["reftarget"] = "doc", PAGES[path]
                link["reftargetid"] = anchor
            elif path.is_dir():
                link.replace_self(link.children)
            else:
                here = (DOCS / self.env.docname).parent
                file = dict(reftype="myst", refdomain=None, refdoc=self.env.docname)
                file |= dict(refexplicit=True, reftarget=os.path.relpath(path, here))
                link.replace_self(addnodes.download_reference("", *link.children, **file))

    def _path(self, link: addnodes.pending_xref) -> Path | None:
        """The file or folder that a Markdown link names; None for any other link."""
        target = link["reftarget"].partition("#")[0]
        if link.get("reftype") != "myst" or not target:
            return None
        if link.get("refdomain") == "doc":
            return (DOCS / f"{target}.md").resolve()
        included = self.env.docname in PAGES.values()  # which lie in the root of the repository
        here = ROOT if included else (DOCS / self.env.docname).parent
        found = [(folder / target).resolve() for folder in (here, DOCS)]
        return next((path for path in found if path.exists()), None)


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers what changes sources, and what changes links."""
    app.connect("source-read", replace_pictures)
    app.connect("include-read", replace_included)
    app.add_transform(LinksOutOfDocs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
