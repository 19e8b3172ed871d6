"""Factor statistics: moving averages of G G^T along each dimension of a block."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import SHARE, check_options
from shampoo_jax.blocks.blocks import Blocks, Matrices, Part, Stacks, microbatches_of, stateless
from shampoo_jax.matrix.products import contract, gram, identity_like, swift_gram
from shampoo_jax.parts.filtering import Average, counted

Array = jax.Array


class AccumulateFactorsState(NamedTuple):
    """State of `accumulate_factors`."""

    count: Array  # int32[], steps taken
    factors: Any  # per stack a tuple over dimensions of float32 [N, d, d] or None


def accumulate_factors(
    b2: float | Array = 0.9,
    *,
    bias_correction: bool = True,
    weighted: bool = True,
    microbatches: str | None = None,
    swift: bool = False,
) -> Part:
    """Sets the matrices of each stack to its factors, one per preconditioned dimension.

    `S_k = b2 * S_k + w * G_(k) G_(k)^T` with `w = 1 - b2`, reported as `S_k / (1 - b2^t)`. With
    `b2 = 1` this is the plain sum of Shampoo's first form, uncorrected. With `microbatches` it is
    `mean_j G_j G_j^T` in the place of `G G^T`: the gradient's noise counts in full, not divided by
    the number of microbatches, and is not that of G where the two are of different data
    (arXiv:2605.20756).

    Args:
      b2: Decay in [0, 1].
      bias_correction: Whether to divide by `1 - b2^t`.
      weighted: Whether `w = 1 - b2`; False adds `G G^T` with weight 1, uncorrected.
      microbatches: Name, in the extra argument `further`, of a tree of the gradients of
        microbatches, see `blocked`, or of what `mean_of_squares` has made of them one at a time.
      swift: Whether GPUs and TPUs may compute `G G^T` by two products of bfloat16 numbers, with an
        error of 2^-16 of the largest eigenvalue. `scale_by_shampoo` does where its roots cut more.

    Returns:
      A part. Its state holds `[N, d, d]` for each dimension of each stack whose exponent is not 0.

    Raises:
      ValueError: `b2` outside [0, 1]; in `update`, no tree of this name.

    Example:
      >>> import jax.numpy as jnp
      >>> g = jnp.array([[[3.0, 0.0], [4.0, 0.0]]])  # a stack of one 2x2 block
      >>> stacks = {"2x2": Blocks.of(g)}
      >>> tx = accumulate_factors(b2=0.5)
      >>> out, state = tx.update(stacks, tx.init(stacks))
      >>> left, right = out["2x2"].matrices
      >>> left.tolist(), right.tolist()
      ([[[9.0, 12.0], [12.0, 16.0]]], [[[25.0, 0.0], [0.0, 0.0]]])
    """
    check_options(locals())
    average = Average(b2, bias_correction, weighted)

    def step(count: Array, b: Blocks, old: Matrices) -> tuple[Blocks, Matrices]:
        if microbatches is None:
            squares = squares_of(b.gradient, old, swift)
        else:
            squares = _mean_squares(b, old, microbatches, swift)
        return averaged(average, count, b, old, squares)

    return counted(AccumulateFactorsState, zero_factors, step)


def count_again(b2: float | Array) -> Part:
    """Counts the newest gradient once more in what is made of the factors, not in their average.

    `S <- b2 * S + G G^T`, G of this step: behind `accumulate_factors(b2, weighted=False)` it has
    the weight `1 + b2` beside `b2^(k + 1)` of one that is k steps old.

    Args:
      b2: Decay in [0, 1].

    Returns:
      A stateless part between statistics and roots. Source: modded-nanogpt track 3, result #18.

    Example:
      >>> import jax.numpy as jnp
      >>> g, factor = jnp.full((1, 1), 2.0), jnp.full((1, 1, 1), 10.0)
      >>> out, _ = count_again(0.5).update({"1": Blocks(g, g, (0.5,), (factor,))}, ())
      >>> out["1"].matrices[0].item()
      9.0
    """
    check_options({"b2": b2})

    def again(b: Blocks) -> Blocks:
        squares = squares_of(b.gradient, b.matrices)
        matrices = jax.tree.map(lambda s, c: (b2 * s + c).astype(s.dtype), b.matrices, squares)
        return dataclasses.replace(b, matrices=matrices, weight=None)

    return stateless(again)


def _mean_squares(b: Blocks, like: Matrices, microbatches: str, swift: bool) -> Matrices:
    """Means over microbatches, as they came or computed one after the other."""
    given = b.further.get(microbatches)
    if isinstance(given, tuple):  # of `mean_of_squares`
        return given
    x = microbatches_of(b, microbatches)
    total, _ = jax.lax.scan(
        lambda total, g: (jax.tree.map(jnp.add, total, squares_of(g, like, swift)), None),
        jax.tree.map(jnp.zeros_like, like),
        x.swapaxes(0, 1),
    )
    return jax.tree.map(lambda s: s / x.shape[1], total)


def squares_of(x: Array, like: Matrices, swift: bool = False) -> Matrices:
    """`X_(k) X_(k)^T` of a stack `[N, *block]` where `like` has a factor."""
    product = swift_gram if swift else gram
    return tuple(None if s is None else contract(x, k, product) for k, s in enumerate(like))


def zero_factors(params: Blocks) -> Matrices:
    """Zero factors `[N, d, d]` for every dimension of a stack with a non-zero exponent."""
    return params.per_factor(lambda n, d, e: jnp.zeros((n, d, d), params.update.dtype))


def averaged(
    average: Average, count: Array, b: Blocks, old: Matrices, squares: Matrices
) -> tuple[Blocks, Matrices]:
    """Blocks with the corrected factors for matrices, and the factors to keep."""
    new = jax.tree.map(average.add, old, squares)
    scale = average.correction(count, b.gradient.dtype)
    weight = average.add(jnp.zeros_like(scale), jnp.ones_like(scale)) / scale
    matrices = jax.tree.map(lambda s: s / scale, new)
    return dataclasses.replace(b, matrices=matrices, weight=weight), new


def map_factors(f: Callable[[Array], Array]) -> Part:
    """Applies a function to every factor of every stack, `[N, d, d] -> [N, d, d]`.

    To be placed between statistics and roots, see `damp` and `normalize_by_trace`. What gradients
    weigh in them is not known any more.

    Args:
      f: Function of a stack of factors.

    Returns:
      A stateless part.
    """
    return stateless(
        lambda b: dataclasses.replace(b, matrices=jax.tree.map(f, b.matrices), weight=None)
    )


def damp(damping: float | Array) -> Part:
    """Adds `damping * I` to every factor; absolute, so it depends on the scale of the gradients.

    Args:
      damping: Not negative.

    Returns:
      A stateless part, to be placed between statistics and roots.

    Raises:
      ValueError: A negative damping.

    Example:
      >>> import jax.numpy as jnp
      >>> g, factor = jnp.ones((1, 2)), jnp.diag(jnp.array([4.0, 0.0]))[None]
      >>> out, _ = damp(0.5).update({"2": Blocks(g, g, (0.5,), (factor,))}, ())
      >>> out["2"].matrices[0].tolist()
      [[[4.5, 0.0], [0.0, 0.5]]]
    """
    check_options({"damping": damping})
    return map_factors(lambda s: s + damping * identity_like(s))


def filled(statistic: optax.GradientTransformation) -> Part:
    """A part that refuses what a statistic of somebody's own leaves in `Blocks.matrices`.

    Args:
      statistic: Any part.

    Returns:
      The same part, whose update raises ValueError unless it has filled in one factor for each
      dimension of every stack that has an exponent.
    """
    tx = optax.with_extra_args_support(statistic)

    def update(stacks: Stacks, state: Any, params: Any = None, **extra: Any) -> Any:
        new, state = tx.update(stacks, state, params, **extra)
        for key in stacks:
            _check_filled(key, new.get(key) if isinstance(new, Mapping) else None)
        return new, state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _check_filled(key: str, b: Any) -> None:
    if not isinstance(b, Blocks):
        raise ValueError(f"statistics= left out the stack {key!r}.")
    dtype = jnp.promote_types(b.gradient.dtype, jnp.float32).name
    wanted = b.per_factor(lambda n, d, e: (n, d, d))
    found = [None if m is None else jnp.shape(m) for m in b.per_dimension]
    dtypes = {jnp.result_type(m).name for m in b.per_dimension if m is not None}
    if found != [*wanted] or not dtypes <= {dtype}:
        raise ValueError(
            f"roots of the stack {key!r} need one factor for each of its dimensions in "
            f"Blocks.matrices, of shapes {list(wanted)} in {dtype}, and find {found} in "
            f"{', '.join(sorted(dtypes)) or 'no dtype'}: statistics= has to fill them in as "
            "accumulate_factors does."
        )


def normalize_by_trace(exponent: float = 0.5, floor: float | Array = 0.0) -> Part:
    """Divides every factor by `max(trace, floor)^exponent`; a zero factor stays zero.

    Args:
      exponent: In (0, 1].
      floor: Smallest trace that is divided by, absolute.

    Returns:
      A stateless part.

    Raises:
      ValueError: An exponent outside (0, 1], a negative floor.

    Example:
      >>> import jax.numpy as jnp
      >>> g, factor = jnp.ones((1, 2)), jnp.diag(jnp.array([12.0, 4.0]))[None]
      >>> out, _ = normalize_by_trace(0.5).update({"2": Blocks(g, g, (0.5,), (factor,))}, ())
      >>> out["2"].matrices[0].tolist()
      [[[3.0, 0.0], [0.0, 1.0]]]
    """
    SHARE.but("0.5 is the root, 1 the trace itself")("exponent", exponent)
    check_options({"floor": floor})

    def divide(s: Array) -> Array:
        trace = jnp.maximum(jnp.trace(s, axis1=1, axis2=2), floor)[:, None, None]
        return jnp.where(trace > 0, s * jnp.where(trace > 0, trace, 1.0) ** -exponent, s)

    return map_factors(divide)
