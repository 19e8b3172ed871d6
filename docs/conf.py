"""Settings of the documentation site; docs/site.md says how it is built and why so."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "shampoo-jax"
author = "the authors of shampoo-jax"
html_title = "shampoo-jax"
root_doc = "index"
exclude_patterns = ["_site", "leaderboard/*.jsonl"]

extensions = [
    "docs._site.executed",  # first: it sets what jax reads when it is imported
    "docs._site.public",
    "docs._site.code_role",
    "docs._site.links",
    "docs._site.mathjax",
    "docs._site.optional",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]

# Markdown as GitHub reads it: `$` for formulas, headings with GitHub's anchors.
myst_enable_extensions = ["attrs_inline", "dollarmath"]
myst_heading_anchors = 4
myst_all_links_external = False

default_role = "code_or_name"
autodoc_typehints = "none"  # spelled out they are pages long; docstrings say what is taken
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]  # of dataclasses: what they take
napoleon_use_rtype = False
python_maximum_signature_line_length = 80
toc_object_entries = False  # every name has a heading of its own
nitpicky = True
# Types of other packages, which signatures of fields name; their pages are not here.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(jax|optax|numpy|collections|typing)\..*|(Row|OnMesh|shampoo_jax\.(inspect|stacks)\..*)",
    )
]

mathjax_path = "mathjax/tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}  # the menu would load more files

html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_domain_indices = False
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the sidebar has the search already
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
linkcheck_timeout = 20
