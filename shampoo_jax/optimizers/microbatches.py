"""Factors of microbatches for a training loop that keeps none of their gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.blocks.blocks import Blocks, MeanSquares, Stacks, each, make_part
from shampoo_jax.optimizers.optimizer import Routed
from shampoo_jax.optimizers.routing import labels_by
from shampoo_jax.parts.factors import squares_of, zero_factors
from shampoo_jax.stacks.blocked import Design, blocked
from shampoo_jax.stacks.guard import Guarded, unguarded, widen
from shampoo_jax.stacks.missing import fill_missing


class MeanOfSquares(NamedTuple):
    """Two functions, as `mean_of_squares` gives them.

    Attributes:
      init: Function of parameters giving zero means, to begin each step with.
      add: Function of means and the gradients of one more microbatch giving new means; with the
        parameters as a third argument gradients may be None, which counts as zeros.
    """

    init: Callable[[Any], MeanSquares]
    add: Callable[..., MeanSquares]


def mean_of_squares(tx: Guarded) -> MeanOfSquares:
    """Accumulates `mean_j G_j G_j^T` over microbatches, for one optimizer's factors.

    Gradients are cut into the blocks of this optimizer, squared at their owners and forgotten: at
    any time there are one microbatch's gradients and the means, `[N, d, d]` as the factors. The
    result goes into the extra argument `further`, where `accumulate_factors(microbatches=name)`
    finds it.

    Args:
      tx: `scale_by_shampoo(...)`, `blocked(...)`, or a complete optimizer such as `shampoo(...)`,
        whose other parameters are left out; without wrappers of Optax around it.

    Returns:
      `init(params)` and `add(means, gradients, params=None)`, for use in and outside of jit, in
      `lax.scan` say.

    Raises:
      ValueError: An optimizer that has no blocks; in `add`, a gradient that is None without the
        parameters, which tell its shape.

    Example:
      >>> import jax, jax.numpy as jnp, optax, shampoo_jax
      >>> statistics = shampoo_jax.accumulate_factors(0.95, microbatches="squares")
      >>> tx = shampoo_jax.shampoo(0.01, statistics=statistics)
      >>> squares = shampoo_jax.mean_of_squares(tx)
      >>> def loss(p, batch):
      ...     return jnp.mean((batch @ p["w"]) ** 2)
      >>> @jax.jit
      ... def step(params, state, batches):  # [m, ...], m microbatches
      ...     def add(carry, batch):
      ...         total, means = carry
      ...         gradients = jax.grad(loss)(params, batch)
      ...         return (optax.tree.add(total, gradients), squares.add(means, gradients)), None
      ...     start = (optax.tree.zeros_like(params), squares.init(params))
      ...     (total, means), _ = jax.lax.scan(add, start, batches)
      ...     mean = optax.tree.scale(1 / len(batches), total)
      ...     updates, state = tx.update(mean, state, params, further={"squares": means})
      ...     return optax.apply_updates(params, updates), state
      >>> params = {"w": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> params, state = step(params, tx.init(params), jnp.ones((4, 5, 3)))
    """
    design, taken = getattr(tx, "design", None), None
    if isinstance(design, Routed):
        design, taken = design.direction, labels_by(design.rule)
    if not isinstance(design, Design):
        raise ValueError(
            f"tx={tx} has no blocks: give shampoo(...) or scale_by_shampoo(...), without wrappers."
        )
    frame: Any = {n: getattr(design, n) for n in ("blocking", "exponents", "chunk", "placement")}
    cut = unguarded(blocked(_squares(), **frame))

    def matrices(tree: Any) -> Any:
        if taken is None:
            return tree
        labels = taken(tree)
        keep = lambda x, label: x if label == "matrices" else optax.MaskedNode()  # noqa: E731
        return jax.tree.map(keep, tree, labels)

    def init(params: Any) -> MeanSquares:
        return cut.init(matrices(params)).inner

    def add(means: MeanSquares, gradients: Any, params: Any = None) -> MeanSquares:
        filled, _, _ = fill_missing(gradients, params, lambda _: True)
        if any(x is None for x in jax.tree.leaves(filled, is_leaf=lambda x: x is None)):
            raise ValueError(
                "gradients=None for a parameter, whose shape is not known: give add(means, "
                "gradients, params), or zeros."
            )
        given = widen(matrices(filled))
        return cut.update(given, cut.init(given)._replace(inner=means))[1].inner

    return MeanOfSquares(init, add)


def _squares() -> optax.GradientTransformation:
    """A part that changes no update; its state are the means."""

    def init(params: Stacks) -> MeanSquares:
        return MeanSquares(jnp.zeros([], jnp.float32), each(zero_factors, params))

    def update(stacks: Stacks, means: MeanSquares, params: Any, **extra: Any) -> Any:
        count = means.count + 1

        def one(b: Blocks, old: Any) -> Any:
            squares = squares_of(b.gradient, old)
            return jax.tree.map(lambda m, s: m + (s - m) / count.astype(m.dtype), old, squares)

        return stacks, MeanSquares(count, each(one, stacks, means.factors))

    return make_part(init, update)
