"""Pages of docs/ lead somewhere, and what the site needs of them is there without Sphinx.

`make docs` runs the Python blocks of the pages that teach, which takes longer than this suite may.
"""

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import shampoo_jax
from scripts.maintenance.site.blocks import fenced_blocks
from shampoo_jax import matrix, presets
from tests.test_readme import PAGES as ALONE
from tests.test_readme import SHELLS, check, commands

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TAUGHT = [page for page in PAGES if page.parent.name in ("concepts", "howto")]
TAUGHT += [DOCS / name for name in ("index.md", "start.md", "questions.md", "site.md")]
WRITTEN = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES}


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    titles = [
        "".join(part.content for part in tokens[k + 1].children or [] if part.content)
        for k, token in enumerate(tokens)
        if token.type == "heading_open"
    ]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    """Targets of the links and pictures of a page that are no addresses."""
    markdown = page.read_text(encoding="utf-8")
    tokens = MarkdownIt().enable("table").parse(markdown)
    parts = [part for token in tokens for part in token.children or []]
    found = [str(part.attrs.get("href") or part.attrs.get("src") or "") for part in parts]
    found += re.findall(r'(?:srcset|src)="([^"]+)"', markdown)
    return [target for target in found if target and "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_are_there(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name_of(page)} links to {target}: there is no {path}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{name_of(page)}: {there.name} has no #{anchor}"


def test_every_page_is_in_the_table_of_contents():
    contents = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^[\w/*.-]+$", contents, re.MULTILINE)
    listed += [f"reference/{name.stem}" for name in (DOCS / "reference").glob("*.md")]
    missing = {
        name
        for name in WRITTEN - {"index"}
        if not any(name == entry or Path(name).match(entry) for entry in listed)
    }
    assert not missing, f"docs/index.md has no entry for {sorted(missing)}"


def public_names() -> list[str]:
    return [
        *(f"shampoo_jax.{name}" for name in shampoo_jax.__all__),
        *(f"shampoo_jax.matrix.{name}" for name in matrix.__all__),
        *(f"shampoo_jax.presets.{name}" for name in presets.__all__),
    ]


def test_every_public_name_is_in_the_reference_once():
    pages = [page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md")]
    entry = re.compile(r"^\.\. (?:auto\w+|py:module):: (\S+)$", re.MULTILINE)
    assert sorted(entry.findall("\n".join(pages))) == sorted(public_names())


@pytest.mark.parametrize("page", TAUGHT, ids=name_of)
def test_blocks_of_pages_that_teach(page):
    """Shell blocks name what exists; Python blocks are Python, and run when the site is built."""
    for block in fenced_blocks(page.read_text(encoding="utf-8")):
        if block.language == "python":
            compile(block.text, str(page), "exec")
        elif block.language in SHELLS:
            for command in commands(block):
                check(command)
        else:
            assert block.language in ("text", ""), f"{name_of(page)}:{block.line}"


def test_python_blocks_of_every_page_run_somewhere():
    """When the site is built or in this suite; two need a state of torch and a model of Keras."""
    source = (DOCS / "_site/executed.py").read_text(encoding="utf-8")
    named = re.findall(r'"([^"]+\.md)"', source)
    run = {page for pattern in named for page in DOCS.glob(pattern)}
    run |= {ROOT / page for page in ALONE} | {DOCS / "migration.md", DOCS / "frameworks.md"}
    blocks = {page: fenced_blocks(page.read_text(encoding="utf-8")) for page in PAGES}
    code = {page for page, found in blocks.items() if "python" in {b.language for b in found}}
    assert sorted(name_of(page) for page in code - run) == []
