"""Moving averages of what gradients give, and the first of them: the first moment."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import BELOW_ONE, check_options
from shampoo_jax.base.storage import check_form, decode, encode
from shampoo_jax.blocks.blocks import Blocks, Part, Stacks, each, each_of, make_part

Array = jax.Array
BELOW_ONE_OR_SCHEDULE = dataclasses.replace(BELOW_ONE, schedule=True)


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
      mu_dtype: Of the stored average, or a form of one's own, see `scale_by_shampoo`; None means
        that of the blocks. Arithmetic is in theirs.

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
    check_options({"b1": b1, "b3": b3, "bias_correction": bias_correction})
    check_form("mu_dtype", mu_dtype)
    b3 = b1 if b3 is None else b3

    def step(count: Array, b: Blocks, mu: Any) -> tuple[Blocks, Any]:
        g, old = b.gradient, decode(mu, b.gradient.dtype)
        out = b3 * old + (1 - b3) * g
        if bias_correction:
            out = out / (1 - b3 * power(b1, count - 1, out.dtype))
        new = b1 * old + (1 - b1) * g
        return dataclasses.replace(b, update=out.astype(g.dtype)), encode(new, mu)

    return counted(FilterGradientState, lambda p: encode(jnp.zeros_like(p.update), mu_dtype), step)


class NesterovAverageState(NamedTuple):
    """State of `nesterov_average`."""

    count: Array  # int32[], steps taken
    mu: Any  # one [N, *block] a stack


def nesterov_average(b1: float | Array | optax.Schedule = 0.95) -> Part:
    """Sets the update to Nesterov's look ahead of an uncorrected moving average of the gradient.

    `mu = b1 * mu + (1 - b1) * G`, then `update = b1 * mu + (1 - b1) * G`, from `mu = 0`: the
    momentum of modded-nanogpt's Muon. With a constant b1 it is `filter_gradient(b1, b1^2)` without
    its correction.

    Args:
      b1: Decay in [0, 1), or a schedule of it, `rise_and_fall` say, of the step counted from 0.

    Returns:
      A part. Its state holds one array per stack of blocks.

    Raises:
      ValueError: A decay outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = nesterov_average(optax.linear_schedule(0.0, 0.5, 1))
      >>> first, state = tx.update(jnp.array(4.0), tx.init(jnp.array(0.0)))
      >>> second, state = tx.update(jnp.array(2.0), state)
      >>> float(first), float(second)  # 4, then (4 + 2) / 4 + 2 / 2
      (4.0, 2.5)
    """
    BELOW_ONE_OR_SCHEDULE("b1", b1)

    def step(count: Array, b: Blocks, mu: Array) -> tuple[Blocks, Array]:
        decay = b1(count - 1) if callable(b1) else b1
        decay = jnp.asarray(decay, b.gradient.dtype)
        mix = lambda m: decay * m + (1 - decay) * b.gradient  # noqa: E731
        mu = mix(mu)
        return dataclasses.replace(b, update=mix(mu)), mu

    return counted(NesterovAverageState, lambda p: jnp.zeros_like(p.update), step)


def counted(kind: Any, first: Callable[[Blocks], Any], step: Callable[..., Any]) -> Part:
    """A part whose state is a count of steps and one entry a stack.

    Args:
      kind: Type of the state, of the count, int32[], and the entries by stack.
      first: Function of a stack of parameters giving its first entry.
      step: Function of (count with this step, blocks, entry) giving new blocks and entry.

    Returns:
      The part.
    """

    def init(params: Stacks) -> Any:
        return kind(jnp.zeros([], jnp.int32), each(first, params))

    def update(stacks: Stacks, state: Any, params: Any, **extra: Any) -> tuple[Stacks, Any]:
        count = optax.safe_increment(state[0])
        new, entries = each_of(2, functools.partial(step, count), stacks, state[1])
        return new, kind(count, entries)

    return make_part(init, update)


class Average(NamedTuple):
    """A moving average, or with `b2 = 1` a sum, of what every gradient gives.

    Attributes:
      b2: Decay in [0, 1].
      bias_correction: Whether `correction` is that of the weights' sum.
      weighted: Whether new values have weight `1 - b2`; with weight 1 there is no correction.
    """

    b2: Any
    bias_correction: bool
    weighted: bool

    def add(self, old: Array, new: Array) -> Array:
        """`b2 * old + w * new` in the dtype of the old."""
        weight = jnp.where(jnp.asarray(self.b2) == 1, 1.0, 1 - self.b2) if self.weighted else 1.0
        return (self.b2 * old + weight * new).astype(old.dtype)

    def correction(self, count: Array, dtype: Any) -> Array:
        """What the average is to be divided by: `1 - b2^t`, or 1."""
        if not (self.bias_correction and self.weighted):
            return jnp.ones([], dtype)
        sums = jnp.asarray(self.b2) == 1
        return jnp.where(sums, 1.0, 1 - power(self.b2, count, dtype)).astype(dtype)


def power(base: float | Array, count: Array, dtype: Any) -> Array:
    """`base ** count` in the given precision, 1 at count 0 even for base 0."""
    base = jnp.asarray(base, dtype)
    return jnp.where(count == 0, jnp.ones([], dtype), base ** count.astype(dtype))
