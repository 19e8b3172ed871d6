"""Adam whose two moments are of different microbatches: no noise that both have in common."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from shampoo_jax.base.options import WholeNumber, check_choice, check_flag, check_options
from shampoo_jax.blocks.blocks import Blocks, Part, microbatches_of
from shampoo_jax.matrix.noise import variance_of_mean
from shampoo_jax.parts.filtering import Average, counted

Array = jax.Array
Moments = tuple[Array, Array]


class CrossFittedAdamState(NamedTuple):
    """State of `cross_fitted_adam`."""

    count: Array  # int32[], steps taken
    moments: Any  # per stack mu and nu, [N, *block] each


def cross_fitted_adam(
    b1: float | Array = 0.9,
    b2: float | Array = 0.95,
    eps: float | Array = 1e-8,
    *,
    folds: int | None = None,
    squares: Literal["of_mean", "mean_of"] = "of_mean",
    debias: bool = False,
    microbatches: str = "microbatches",
) -> Part:
    """Sets the update to the mean over folds of Adam's, each divided by what the others say.

    The m microbatches of a step are split into folds r; with `M_r`, the first moment if only the
    fold's own mean gradient came in, and `p_r`, the root of the second if only the others did,

      `U = mean_r M_r / p_r`,

    both bias-corrected. The moments that are kept are Adam's, of the mean gradient of all. Every
    microbatch serves both moments, and none is needed twice. Source: arXiv:2605.20756 (leave one
    out; two folds).

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second, in [0, 1].
      eps: Added to its root; on the scale of the gradients.
      folds: A number that divides m, at least 2; None leaves one microbatch out at a time.
      squares: The second moment takes the square `"of_mean"` of the others, or the `"mean_of"`
        their squares, one a microbatch.
      debias: Whether `1 / p_r` becomes `1 / p_r - V / p_r^3`. With `"of_mean"` V is the variance of
        the `p_r` over folds, as the paper's code has it, and the update 0 where this turns its
        sign; with `"mean_of"` V is that of the mean over the other microbatches, of which it takes
        two, and no inverse falls below 0, see `scale_by_second_moment`.
      microbatches: Name of their gradients in the extra argument `further`, see `blocked`.

    Returns:
      A part to be used in `blocked`. Its state holds two stacks per stack of blocks.

    Raises:
      ValueError: An option out of range; in `update`, no tree of this name, folds that do not
        divide its microbatches, or too few of these.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> tx = shampoo_jax.blocked(cross_fitted_adam())
      >>> params, micro = {"w": jnp.zeros(1)}, {"w": jnp.array([[1.0], [3.0]])}
      >>> mean = {"w": micro["w"].mean(0)}
      >>> updates, _ = tx.update(mean, tx.init(params), further={"microbatches": micro})
      >>> updates["w"].round(3).tolist()  # (1 / 3 + 3 / 1) / 2
      [1.667]
    """
    check_options(locals())
    check_choice("squares", squares, ("of_mean", "mean_of"))
    check_flag("debias", debias)
    if folds is not None:
        WholeNumber("None leaves one out", least=2)("folds", folds)
    first, second = Average(b1, True, True), Average(b2, True, True)

    def step(count: Array, b: Blocks, old: Moments) -> tuple[Blocks, Moments]:
        (mu, nu), x = old, microbatches_of(b, microbatches, 2)
        own, mean = _fold_means(x, folds), jnp.mean(x, 1)
        scale = second.correction(count, nu.dtype)

        def root(energy: Array) -> Array:
            return jnp.sqrt(second.add(nu[:, None], energy) / scale) + eps

        energy = _others(own) ** 2 if squares == "of_mean" else _others(_fold_means(x**2, folds))
        roots = root(energy)
        safe = jnp.where(roots > 0, roots, 1.0)
        moments = first.add(mu[:, None], own) / first.correction(count, mu.dtype)
        terms = jnp.where(roots > 0, moments / safe, 0.0)
        update = jnp.mean(terms, 1)
        if debias:
            samples = roots if squares == "of_mean" else root(x**2)
            share = _relative_variance(samples, safe, squares)
            share = jnp.minimum(share, 1) if squares == "mean_of" else share
            less = jnp.mean(terms * (1 - share), 1)
            update = jnp.where(less * update > 0, less, 0.0) if squares == "of_mean" else less
        return dataclasses.replace(b, update=update), (first.add(mu, mean), second.add(nu, mean**2))

    def zeros(p: Blocks) -> Moments:
        return jnp.zeros_like(p.update), jnp.zeros_like(p.update)

    return counted(CrossFittedAdamState, zeros, step)


def _fold_means(x: Array, folds: int | None) -> Array:
    """Means over each of equal folds, `[N, m, *block] -> [N, folds, *block]`; None for m folds."""
    n, m, *block = x.shape
    if folds is not None and m % folds:
        raise ValueError(
            f"folds={folds} does not divide {m} microbatches: give a divisor, or None."
        )
    return x if folds is None else jnp.mean(x.reshape(n, folds, m // folds, *block), 2)


def _others(x: Array) -> Array:
    """Of every fold the mean over all others, `[N, folds, *block]`."""
    return (jnp.sum(x, 1, keepdims=True) - x) / (x.shape[1] - 1)


def _relative_variance(samples: Array, roots: Array, squares: str) -> Array:
    """V over the square of each fold's root, `[N, folds, *block]`."""
    if squares == "of_mean":
        ratios = samples / roots[:, :1]
        return jnp.var(ratios, 1, ddof=1, keepdims=True) * (roots[:, :1] / roots) ** 2
    m, folds = samples.shape[1], roots.shape[1]
    if m - m // folds < 2:
        raise ValueError(
            f"debias=True with squares='mean_of' leaves 1 of {m} microbatches to the others: their "
            "variance needs 2, give more microbatches."
        )
    apart = samples.reshape(len(samples), folds, m // folds, *samples.shape[2:])

    def one(r: int) -> Array:
        others = jnp.delete(apart, r, 1, assume_unique_indices=True)
        flat = others.reshape(len(samples), -1, *samples.shape[2:])
        return variance_of_mean(flat / roots[:, r, None], 1)

    return jnp.stack(list(map(one, range(folds))), 1)
