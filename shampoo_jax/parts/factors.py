"""Factor statistics: moving averages of G G^T along each dimension of a block."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import check_range
from shampoo_jax.blocks.blocks import Blocks, Part, blocks_part, map_blocks
from shampoo_jax.blocks.exponents import Exponents, default_exponents, per_factor
from shampoo_jax.parts.filtering import power

Array = jax.Array


class AccumulateFactorsState(NamedTuple):
    """State of `accumulate_factors`."""

    count: Array  # int32[], steps taken
    factors: Any  # per stack a tuple over dimensions of float32 [N, d, d] or None


def contract(x: Array, dim: int) -> Array:
    """`X_(k) X_(k)^T` of each block: contraction of a stack with itself over all but one dimension.

    Args:
      x: Stack `[N, *block]`.
      dim: Dimension of the block, counted without the stack axis.

    Returns:
      `[N, d, d]` in the dtype of `x`, accumulated at full precision.
    """
    rows = jnp.moveaxis(x, dim + 1, 1)
    rows = rows.reshape(*rows.shape[:2], -1)
    return jnp.matmul(rows, rows.swapaxes(1, 2), precision=jax.lax.Precision.HIGHEST)


def accumulate_factors(
    b2: float | Array = 0.9,
    *,
    exponents: Exponents = default_exponents,
    bias_correction: bool = True,
    weighted: bool = True,
) -> Part:
    """Sets the matrices of each stack to its factors, one per preconditioned dimension.

    `S_k = b2 * S_k + w * G_(k) G_(k)^T` with `w = 1 - b2`, reported as `S_k / (1 - b2^t)`. With
    `b2 = 1` this is the plain sum of Shampoo's first form, uncorrected.

    Args:
      b2: Decay in [0, 1].
      exponents: Exponents by block shape; dimensions with exponent 0 get no factor.
      bias_correction: Whether to divide by `1 - b2^t`.
      weighted: Whether `w = 1 - b2`; False adds `G G^T` with weight 1, uncorrected.

    Returns:
      A part. Its state holds `[N, d, d]` for each preconditioned dimension of each stack.

    Raises:
      ValueError: `b2` outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> g = jnp.array([[[3.0, 0.0], [4.0, 0.0]]])  # a stack of one 2x2 block
      >>> blocks = {"2x2": Blocks(gradient=g, update=g)}
      >>> tx = accumulate_factors(b2=0.5)
      >>> out, state = tx.update(blocks, tx.init(blocks))
      >>> left, right = out["2x2"].matrices
      >>> left.tolist(), right.tolist()
      ([[[9.0, 12.0], [12.0, 16.0]]], [[[25.0, 0.0], [0.0, 0.0]]])
    """
    check_range("b2", b2, closed=True)

    def init(params: Any) -> AccumulateFactorsState:
        return AccumulateFactorsState(
            jnp.zeros([], jnp.int32), map_blocks(lambda p: zero_factors(p, exponents), params)
        )

    def update(blocks: Any, state: AccumulateFactorsState, params: Any) -> tuple[Any, Any]:
        del params
        count = optax.safe_increment(state.count)

        def accumulate(b: Blocks, factors: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
            new = [None if s is None else contract(b.gradient, k) for k, s in enumerate(factors)]
            return decay_factors(factors, new, b2, weighted)

        factors = map_blocks(accumulate, blocks, state.factors)

        def report(b: Blocks, factors: tuple[Array | None, ...]) -> Blocks:
            scale = factor_correction(b2, count, b.gradient.dtype, bias_correction and weighted)
            return dataclasses.replace(b, matrices=jax.tree.map(lambda s: s / scale, factors))

        return map_blocks(report, blocks, factors), AccumulateFactorsState(count, factors)

    return blocks_part(init, update)


def zero_factors(params: Blocks, exponents: Exponents) -> tuple[Array | None, ...]:
    """Zero factors `[N, d, d]` for every dimension of a stack with a non-zero exponent."""
    dtype = params.update.dtype
    return per_factor(lambda n, d, e: jnp.zeros((n, d, d), dtype), params.update.shape, exponents)


def decay_factors(
    old: tuple[Array | None, ...],
    new: Sequence[Array | None],
    b2: float | Array,
    weighted: bool,
) -> tuple[Array | None, ...]:
    """`b2 * old + w * new` for every dimension that has a factor."""
    weight = jnp.where(jnp.asarray(b2) == 1, 1.0, 1 - b2) if weighted else 1.0
    return jax.tree.map(lambda s, c: (b2 * s + weight * c).astype(s.dtype), old, tuple(new))


def factor_correction(b2: float | Array, count: Array, dtype: Any, corrected: bool) -> Array:
    """`1 - b2^t`, or 1 where factors are sums or correction is off."""
    if not corrected:
        return jnp.ones([], dtype)
    return jnp.where(jnp.asarray(b2) == 1, 1.0, 1 - power(b2, count, dtype)).astype(dtype)


def map_factors(f: Callable[[Array], Array]) -> Part:
    """Applies a function to every factor of every stack, `[N, d, d] -> [N, d, d]`.

    To be placed between statistics and roots, see `damp` and `normalize_by_trace`.

    Args:
      f: Function of a stack of factors.

    Returns:
      A stateless part.
    """

    def update(blocks: Any, state: Any, params: Any) -> tuple[Any, Any]:
        del params
        new = map_blocks(
            lambda b: dataclasses.replace(b, matrices=jax.tree.map(f, b.matrices)), blocks
        )
        return new, state

    return blocks_part(lambda params: optax.EmptyState(), update)


def damp(eps: float | Array) -> Part:
    """Adds `eps * I` to every factor; absolute, so it depends on the scale of the gradients.

    Args:
      eps: Not negative.

    Returns:
      A stateless part, to be placed between statistics and roots.

    Example:
      >>> import jax.numpy as jnp
      >>> g, factor = jnp.ones((1, 2)), jnp.diag(jnp.array([4.0, 0.0]))[None]
      >>> out, _ = damp(0.5).update({"2": Blocks(g, g, matrices=(factor,))}, ())
      >>> out["2"].matrices[0].tolist()
      [[[4.5, 0.0], [0.0, 0.5]]]
    """
    return map_factors(lambda s: s + eps * jnp.eye(s.shape[-1], dtype=s.dtype))


def normalize_by_trace(exponent: float = 0.5, eps: float | Array = 0.0) -> Part:
    """Divides every factor by `max(trace, eps)^exponent`; a zero factor stays zero.

    Args:
      exponent: In (0, 1].
      eps: Smallest trace that is divided by, absolute.

    Returns:
      A stateless part.

    Raises:
      ValueError: An exponent outside (0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> g, factor = jnp.ones((1, 2)), jnp.diag(jnp.array([12.0, 4.0]))[None]
      >>> out, _ = normalize_by_trace(0.5).update({"2": Blocks(g, g, matrices=(factor,))}, ())
      >>> out["2"].matrices[0].tolist()
      [[[3.0, 0.0], [0.0, 1.0]]]
    """
    if not 0 < exponent <= 1:
        raise ValueError(f"exponent={exponent} of the trace must lie in (0, 1].")

    def divide(s: Array) -> Array:
        trace = jnp.maximum(jnp.trace(s, axis1=1, axis2=2), eps)[:, None, None]
        return jnp.where(trace > 0, s * jnp.where(trace > 0, trace, 1.0) ** -exponent, s)

    return map_factors(divide)
