"""Every public name, and the check that docs/reference has each of them."""

from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import shampoo_jax
from shampoo_jax import matrix, presets

logger = logging.getLogger(__name__)


def public_names() -> list[str]:
    """Dotted names of all that the library exports."""
    return [
        *(f"shampoo_jax.{name}" for name in shampoo_jax.__all__),
        *(f"shampoo_jax.matrix.{name}" for name in matrix.__all__),
        *(f"shampoo_jax.presets.{name}" for name in presets.__all__),
    ]


def short_names() -> dict[str, str]:
    """What docstrings call public names, by what they write; the package's own names win."""
    found: dict[str, str] = {}
    for name in public_names():
        short = name.removeprefix("shampoo_jax.")
        found[name] = found[short] = name
    for name in matrix.__all__:
        found.setdefault(name, f"shampoo_jax.matrix.{name}")
    return found


PUBLIC = short_names()


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns, which fails the build, of each public name that no page of the reference has."""
    documented: dict[str, Any] = env.get_domain("py").objects  # type: ignore[attr-defined]
    for name in public_names():
        if name not in documented:
            logger.warning("%s is public and on no page: add it to docs/reference", name)
    logger.info("%d public names are in the reference", len(public_names()))


def setup(app: Sphinx) -> dict[str, bool]:
    """Checks when all pages have been read."""
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
