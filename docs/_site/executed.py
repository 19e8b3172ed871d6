"""Runs the Python blocks of the pages that teach, before the site is written.

Blocks of the other pages run in the test suite, each by itself (tests/test_readme.py), but for
those of migration.md and frameworks.md, which need a state of torch and a model of Keras.
"""

import os
import tempfile
import time
from contextlib import chdir
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util import logging

from scripts.maintenance.site.blocks import run_page

logger = logging.getLogger(__name__)
DOCS = Path(__file__).parents[1]
EXECUTED = (
    *("index.md", "start.md", "questions.md", "concepts/*.md", "howto/*.md"),
    *("hardware.md", "images.md", "records.md", "release-0.2.md"),
)


def run_pages(app: Sphinx) -> None:
    """Runs them in an empty folder; the first failure ends the build."""
    start, number = time.perf_counter(), 0
    pages = sorted(page for pattern in EXECUTED for page in DOCS.glob(pattern))
    for page in pages:
        began = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder, chdir(folder):
                blocks = run_page(page)
        except Exception as error:
            raise ExtensionError(f"a block of {page.relative_to(DOCS)} fails: {error!r}") from error
        number += blocks
        if blocks:
            took = time.perf_counter() - began
            logger.info("%s: %d blocks, %.1f s", page.relative_to(DOCS), blocks, took)
    took = time.perf_counter() - start
    logger.info("%d blocks of %d pages ran in %.1f s", number, len(pages), took)


def setup(app: Sphinx) -> dict[str, bool]:
    """Runs them first."""
    # jax reads these when it is first asked for devices. Eight of a CPU stand in for a mesh;
    # compiling is most of what blocks take, and without LLVM's optimizations it takes half.
    flags = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    app.connect("builder-inited", run_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
