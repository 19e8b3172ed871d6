"""Elementwise scales that are computed now and then and used in between."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import check_options
from shampoo_jax.blocks.blocks import Blocks, Part, Stacks, each, make_part
from shampoo_jax.parts.refresh import when

Array = jax.Array


class CachedScaleState(NamedTuple):
    """State of `cached_scale`."""

    count: Array  # int32[], steps taken
    inner: Any  # of the part inside
    scale: Any  # one [N, *block] a stack


def cached_scale(inner: optax.GradientTransformation, every: int | Array = 10) -> Part:
    """Scales updates by what a part last made of ones: it runs at steps 1, 1 + every, ... only.

    Between them the part sees nothing, so that its statistics cost nothing either. Sophia
    (arXiv:2305.14342) with the Gauss-Newton-Bartlett estimate of the Hessian's diagonal, for
    gradients of sampled labels in `further["sampled"]`, is

      `filter_gradient(b1, bias_correction=False)`,
      `cached_scale(scale_by_second_moment(b2, eps, exponent=1.0, bias_correction=False,
      microbatches="sampled"))`, then `on_updates(optax.clip(...))`.

    Args:
      inner: Part that multiplies each entry of the update by a number of its own, such as
        `scale_by_second_moment`.
      every: Steps between its runs, at least 1.

    Returns:
      A part. Its state holds that of the inner part and one stack per stack of blocks.

    Raises:
      ValueError: `every` below 1, or an inner part that is no transformation.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> tx = cached_scale(shampoo_jax.scale_by_second_moment(0.5), every=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for g in (4.0, 8.0):
      ...     updates, state = tx.update(jnp.array([g]), state)
      >>> updates.tolist()  # the second is divided by the first
      [2.0]
    """
    check_options(locals())
    tx = optax.with_extra_args_support(inner)

    def init(params: Stacks) -> CachedScaleState:
        ones = each(lambda p: jnp.ones_like(p.update), params)
        return CachedScaleState(jnp.zeros([], jnp.int32), tx.init(params), ones)

    def update(
        stacks: Stacks, state: CachedScaleState, params: Any, **extra: Any
    ) -> tuple[Stacks, CachedScaleState]:
        def run(old: CachedScaleState) -> CachedScaleState:
            ones = each(lambda b: dataclasses.replace(b, update=jnp.ones_like(b.update)), stacks)
            new, kept = tx.update(ones, old.inner, params, **extra)
            return old._replace(inner=kept, scale=each(lambda b: b.update, new))

        count, state = optax.safe_increment(state.count), when(state.count % every == 0, run, state)
        return each(_scaled, stacks, state.scale), state._replace(count=count)

    return make_part(init, update)


def _scaled(b: Blocks, scale: Array) -> Blocks:
    return dataclasses.replace(b, update=b.update * scale)
