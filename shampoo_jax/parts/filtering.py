"""The first moment: an exponential moving average of the gradient."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import check_dtype, check_range
from shampoo_jax.blocks.blocks import Blocks, Part, Stacks, each, each_of, make_part

Array = jax.Array


class FilterGradientState(NamedTuple):
    """State of `filter_gradient`."""

    count: Array  # int32[], steps taken
    mu: Any  # one [N, *block] a stack


def filter_gradient(
    b1: float | Array = 0.9,
    b3: float | Array | None = None,
    *,
    bias_correction: bool = True,
    mu_dtype: Any = None,
) -> Part:
    """Sets the update to a moving average of the raw gradient.

    `update = (b3 * mu + (1 - b3) * G) / (1 - b3 * b1^(t-1))`, then `mu = b1 * mu + (1 - b1) * G`.
    With `b3 = b1`, the default, the update is the bias-corrected new `mu` itself; a smaller `b3`
    gives Nesterov-like or Lion-like mixes.

    Args:
      b1: Decay of the stored average, in [0, 1).
      b3: Decay of the emitted average, in [0, 1); None means `b1`.
      bias_correction: Whether to divide by the sum of the weights.
      mu_dtype: Of the stored average; None means that of the blocks. Arithmetic is in theirs.

    Returns:
      A part. Its state holds one array per stack of blocks.

    Raises:
      ValueError: A decay outside [0, 1), or a dtype that cannot hold gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = filter_gradient(b1=0.5)
      >>> first, state = tx.update(jnp.array(4.0), tx.init(jnp.array(0.0)))
      >>> second, state = tx.update(jnp.array(1.0), state)
      >>> float(first), float(second)  # 4, then (4/4 + 1/2) / (1 - 1/4)
      (4.0, 2.0)
    """
    check_range("b1", b1)
    check_range("b3", b3)
    check_dtype("mu_dtype", mu_dtype)
    b3 = b1 if b3 is None else b3

    def init(params: Stacks) -> FilterGradientState:
        mu = each(lambda p: jnp.zeros_like(p.update, mu_dtype), params)
        return FilterGradientState(jnp.zeros([], jnp.int32), mu)

    def update(
        stacks: Stacks, state: FilterGradientState, params: Any, **extra: Any
    ) -> tuple[Stacks, FilterGradientState]:
        del params, extra

        def one(b: Blocks, mu: Array) -> tuple[Blocks, Array]:
            g, old = b.gradient, mu.astype(b.gradient.dtype)
            out = b3 * old + (1 - b3) * g
            if bias_correction:
                out = out / (1 - b3 * power(b1, state.count, out.dtype))
            new = b1 * old + (1 - b1) * g
            return dataclasses.replace(b, update=out.astype(g.dtype)), new.astype(mu.dtype)

        new, mu = each_of(2, one, stacks, state.mu)
        return new, FilterGradientState(optax.safe_increment(state.count), mu)

    return make_part(init, update)


def power(base: float | Array, count: Array, dtype: Any) -> Array:
    """`base ** count` in the given precision, 1 at count 0 even for base 0."""
    base = jnp.asarray(base, dtype)
    return jnp.where(count == 0, jnp.ones([], dtype), base ** count.astype(dtype))
