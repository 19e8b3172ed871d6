"""The frame that every direction shares: blocks around first moment, direction, graft, monitor."""

from typing import Any

import optax

from shampoo_jax.blocking import blocked
from shampoo_jax.exponents import Exponents, smaller_side
from shampoo_jax.grafting import graft
from shampoo_jax.monitoring import monitor_spectrum
from shampoo_jax.skipping import skip_nonfinite_blocks


def blocked_walk(
    first_moment: optax.GradientTransformation | None,
    direction: optax.GradientTransformation,
    *,
    magnitude: optax.GradientTransformation | None,
    exponents: Exponents,
    nonfinite: str,
    monitor: int | None,
    canonical: bool,
    **blocking: Any,
) -> optax.GradientTransformationExtraArgs:
    """`blocked` around first moment, direction (grafted where there is a magnitude) and monitor."""
    if nonfinite not in ("propagate", "skip_blocks"):
        raise ValueError(f"nonfinite={nonfinite!r}: use 'propagate' or 'skip_blocks'.")
    parts = [] if first_moment is None else [first_moment]
    parts.append(direction if magnitude is None else graft(magnitude, direction))
    if monitor is not None:
        parts.append(monitor_spectrum(exponents=exponents, every=monitor))
    walk = optax.chain(*parts)
    return blocked(
        skip_nonfinite_blocks(walk) if nonfinite == "skip_blocks" else walk,
        # A block and its transpose can share a stack if their exponents are transposed as well.
        canonical=canonical and exponents((3, 2)) == exponents((2, 3))[::-1],
        # A longer side without factor needs no limit; elsewhere blocks are as in Meta's package.
        exponents=smaller_side if exponents is smaller_side else None,
        **blocking,
    )
