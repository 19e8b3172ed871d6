"""MathJax as one file of the site: formulas need nothing from elsewhere, not even a font file.

The package brings every component of MathJax, 24 MB of them; `tex-svg.js` is all that pages ask
for, since it draws letters itself.
"""

import importlib.util
import shutil
from pathlib import Path

from sphinx.application import Sphinx

COMPONENT = "tex-svg.js"


def copy(app: Sphinx) -> None:
    """Puts the component among the site's static files."""
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("sphinx-mathjax-offline is not installed: use `make docs`")
    source = Path(spec.origin).parent / "static" / "mathjax" / COMPONENT
    target = Path(app.outdir) / "_static" / app.config.mathjax_path
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def setup(app: Sphinx) -> dict[str, bool]:
    """Copies before pages are written."""
    app.connect("builder-inited", copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
