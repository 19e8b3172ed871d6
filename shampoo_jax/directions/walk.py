"""The frame that every direction shares: blocks around first moment, direction, graft, monitor."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

from shampoo_jax.blocks.blocks import Part
from shampoo_jax.parts.grafting import graft
from shampoo_jax.parts.monitoring import monitor_spectrum
from shampoo_jax.parts.refresh import Refresh
from shampoo_jax.solvers.bases import Basis
from shampoo_jax.solvers.solver import Solver
from shampoo_jax.stacks.blocked import Design, blocked
from shampoo_jax.stacks.guard import Guarded


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
    options: Mapping[str, Any],
    factory: Callable[..., optax.GradientTransformation],
    method: Solver | Basis,
    *,
    first_moment: optax.GradientTransformation | None = None,
    magnitude: optax.GradientTransformation | None = None,
    whitened: bool = False,
) -> Guarded:
    """`blocked` around first moment, direction (grafted if there is a magnitude) and monitor.

    Args:
      direction: The part from factors on.
      options: All options of the factory; those that every direction has are read here.
      factory: The `scale_by_*` function itself, which makes the same for another placement.
      method: What computes roots or bases.
      first_moment: Part in front, unless `direction` holds one.
      magnitude: Part whose magnitude is grafted on.
      whitened: See `Work`.
    """
    parts = [] if first_moment is None else [first_moment]
    parts.append(direction if magnitude is None else graft(magnitude, direction))
    if options["monitor"] is not None:
        parts.append(monitor_spectrum(every=options["monitor"]))
    frame = {name: options[name] for name in ("blocking", "exponents", "placement")}
    refresh = options["refresh"] or Refresh()
    tx = blocked(optax.chain(*parts), chunk=_chunk(refresh, options.get("graft")), **frame)
    tx.design = tx.design._replace(
        rebuild=lambda placement: factory(**{**options, "placement": placement}),
        work=Work(method, options["every"], refresh, whitened),
    )
    return tx


def followed_by(direction: Guarded, part: optax.GradientTransformation) -> Guarded:
    """A direction and a part behind it as one chain inside its blocks, at their owners.

    Args:
      direction: `scale_by_soap(...)`, `blocked(...)` or any other direction of this package.
      part: Part of stacks, such as `orthogonalize()`, or a chain of parts; stock transformations
        are lifted by `on_updates`.

    Returns:
      A direction, for `as_optimizer` and `explain` too.

    Raises:
      ValueError: What is no such direction, a complete optimizer say, which has steps behind its
        blocks.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> soap = shampoo_jax.scale_by_soap(every=1)
      >>> soap_muon = shampoo_jax.followed_by(soap, shampoo_jax.orthogonalize())
      >>> tx = shampoo_jax.as_optimizer(soap_muon, 0.02)
      >>> params = {"w": jnp.ones((4, 4))}
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    design = getattr(direction, "design", None)
    if not isinstance(design, Design):
        raise ValueError(
            f"direction={direction} has no blocks of its own: give a scale_by_* function's result, "
            "or blocked(...), and put as_optimizer around the whole."
        )
    names = ("blocking", "exponents", "placement", "chunk")
    frame: Any = {name: getattr(design, name) for name in names}
    tx = blocked(optax.chain(design.inner, part), **frame)
    tx.design = tx.design._replace(
        rebuild=lambda placement: followed_by(design.rebuild(placement), part), work=design.work
    )
    return tx


def _chunk(refresh: Refresh, graft: Any) -> int | str | None:
    """Blocks at a time: all where a stock transformation may look at several."""
    if isinstance(graft, optax.GradientTransformation) and not isinstance(graft, Part):
        return None
    return "auto" if refresh.chunk is None else refresh.chunk
