"""The frame that every direction shares: blocks around first moment, direction, graft, monitor."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from shampoo_jax.base.options import is_number
from shampoo_jax.blocks.exponents import Exponents, uncut_exponents
from shampoo_jax.parts.grafting import graft, make_magnitude
from shampoo_jax.parts.monitoring import monitor_spectrum
from shampoo_jax.stacks.blocked import blocked
from shampoo_jax.stacks.guard import skip_nonfinite_blocks

# Options of a direction that are handed to `blocked` as they are.
BLOCKING = ("block_size", "merge", "dimension_numbers", "placement")


def blocked_walk(
    options: Mapping[str, Any],
    direction: optax.GradientTransformation,
    *,
    exponents: Exponents,
    first_moment: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`blocked` around first moment, direction (grafted if asked for) and monitor.

    Args:
      options: Those of the direction by name, as its `locals()`. Read are `b2` and all that `graft`
        begins with, if there is a `graft`; `monitor`, `nonfinite`, and what `blocked` takes.
      direction: The part in the middle.
      exponents: Those of `options`, resolved.
      first_moment: Part before the direction and its graft.
    """
    nonfinite, every = options["nonfinite"], options["monitor"]
    if nonfinite not in ("propagate", "skip_blocks"):
        raise ValueError(f"nonfinite={nonfinite!r}: use 'propagate' or 'skip_blocks'.")
    parts = [] if first_moment is None else [first_moment]
    magnitude = _magnitude(options) if "graft" in options else None
    parts.append(direction if magnitude is None else graft(magnitude, direction))
    if every is not None:
        parts.append(monitor_spectrum(exponents=exponents, every=every))
    walk = optax.chain(*parts)
    return blocked(
        skip_nonfinite_blocks(walk) if nonfinite == "skip_blocks" else walk,
        # A block and its transpose can share a stack if their exponents are transposed as well.
        canonical=options["canonical"] and exponents((3, 2)) == exponents((2, 3))[::-1],
        exponents=uncut_exponents(options["exponents"]),
        **{name: options[name] for name in BLOCKING},
    )


def _magnitude(options: Mapping[str, Any]) -> optax.GradientTransformation | None:
    """The graft; its decay is `b2` where none is given, but 0.999 where `b2` sums."""
    decay, b2 = options["graft_b2"], options["b2"]
    if decay is None:
        decay = (0.999 if b2 == 1 else b2) if is_number(b2) else jnp.where(b2 == 1, 0.999, b2)
    return make_magnitude(options["graft"], decay, options["graft_eps"])
