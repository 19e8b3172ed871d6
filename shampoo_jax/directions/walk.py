"""The frame that every direction shares: blocks around first moment, direction, graft, monitor."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from shampoo_jax.blocks.blocking import Blocking
from shampoo_jax.blocks.exponents import ExponentOption
from shampoo_jax.parts.grafting import graft as graft_part
from shampoo_jax.parts.monitoring import monitor_spectrum
from shampoo_jax.parts.refresh import Refresh
from shampoo_jax.solvers.bases import Basis
from shampoo_jax.solvers.solver import Solver
from shampoo_jax.stacks.blocked import blocked
from shampoo_jax.stacks.guard import Guarded
from shampoo_jax.stacks.placement import Placement

Rebuild = Callable[[Placement | None], optax.GradientTransformation]


class Work(NamedTuple):
    """What a direction's refreshes cost.

    Attributes:
      method: Solver of roots, or method of bases.
      every: Steps from one refresh to the next.
      refresh: How they are placed.
      whitened: Whether statistics multiply each gradient by the roots of all other sides first.
    """

    method: Solver | Basis
    every: Any
    refresh: Refresh
    whitened: bool = False


def walk(
    direction: optax.GradientTransformation,
    *,
    first_moment: optax.GradientTransformation | None,
    magnitude: optax.GradientTransformation | None,
    monitor: int | None,
    blocking: Blocking | None,
    exponents: ExponentOption,
    placement: Placement | None,
    rebuild: Rebuild,
    work: Work,
) -> Guarded:
    """`blocked` around first moment, direction (grafted if there is a magnitude) and monitor."""
    parts = [] if first_moment is None else [first_moment]
    parts.append(direction if magnitude is None else graft_part(magnitude, direction))
    if monitor is not None:
        parts.append(monitor_spectrum(every=monitor))
    tx = blocked(optax.chain(*parts), blocking=blocking, exponents=exponents, placement=placement)
    tx.design = tx.design._replace(rebuild=rebuild, work=work)
    return tx
