"""Grafting: the direction of one transformation with the magnitude of another, block by block."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import (
    check_choice,
    check_exponent,
    check_options,
    check_transform,
    is_number,
    is_off,
)
from shampoo_jax.blocks.blocks import (
    Blocks,
    Part,
    Stacks,
    each,
    make_part,
    microbatches_of,
    norms,
)
from shampoo_jax.matrix.noise import debiased, variance_of_mean
from shampoo_jax.parts.filtering import Average, counted
from shampoo_jax.parts.lift import from_gradients

Array = jax.Array


# Steps of a transformation that are looked at until one moves: rates may start at zero, and
# gradients be summed over several steps.
LOOKS = 20


class GraftState(NamedTuple):
    """State of `graft`."""

    magnitude: Any
    direction: Any


class ScaleBySecondMomentState(NamedTuple):
    """State of `scale_by_second_moment`."""

    count: Array  # int32[], steps taken
    nu: Any  # one [N, *block] a stack


def graft(magnitude: optax.GradientTransformation, direction: optax.GradientTransformation) -> Part:
    """Gives each block the direction of one part and the Frobenius norm of another.

    `update = D * |A|_F / |D|_F` per block, with `D` and `A` the updates of `direction` and
    `magnitude` on the same input; 0 where `D` is 0. While the direction's preconditioner is not
    ready the update is `A`. Source: Agarwal et al. 2020, "Disentangling adaptive gradient methods".

    Args:
      magnitude: Part of `Blocks`, such as `scale_by_second_moment`; a stock Optax transformation is
        lifted by `from_gradients` first.
      direction: Part of `Blocks`.

    Returns:
      A part whose state holds both states.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from shampoo_jax import from_gradients
      >>> tx = graft(from_gradients(optax.identity()), from_gradients(optax.scale_by_sign()))
      >>> grads = jnp.array([[1.0, -7.0], [5.0, 5.0]])  # of norm 10; its signs have norm 2
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates.tolist()
      [[5.0, -5.0], [5.0, 5.0]]
    """
    check_options({"magnitude": magnitude, "direction": direction})
    magnitude, direction = map(optax.with_extra_args_support, (magnitude, direction))

    def init(params: Stacks) -> GraftState:
        return GraftState(magnitude.init(params), direction.init(params))

    def update(
        stacks: Stacks, state: GraftState, params: Any, **extra: Any
    ) -> tuple[Stacks, GraftState]:
        sized, magnitude_state = magnitude.update(stacks, state.magnitude, params, **extra)
        directed, direction_state = direction.update(stacks, state.direction, params, **extra)
        return each(_graft, directed, sized), GraftState(magnitude_state, direction_state)

    return make_part(init, update)


def _graft(direction: Blocks, magnitude: Blocks) -> Blocks:
    d, a = direction.update, magnitude.update
    size, length = norms(a), norms(d)
    ratio = jnp.where(length > 0, size / jnp.where(length > 0, length, 1.0), 0.0)
    grafted = d * ratio.reshape(-1, *[1] * (d.ndim - 1))
    figures = {**direction.figures, "graft_ratio": ratio}
    update = jnp.where(direction.ready, grafted, a)
    return dataclasses.replace(direction, update=update, figures=figures)


def scale_by_second_moment(
    b2: float | Array = 0.9,
    eps: float | Array = 1e-15,
    *,
    exponent: float | Callable[[int], float] = 0.5,
    bias_correction: bool = True,
    weighted: bool = True,
    eps_hat: bool = False,
    floor: float | Array = 0.0,
    microbatches: str | None = None,
    debias: str | None = None,
) -> Part:
    """Divides the update by the root of a moving average of the squared raw gradient.

    `nu = b2 * nu + w * G^2`, `update = update / ((nu / (1 - b2^t))^e + eps)` with
    `w = 1 - b2` and `e = 1/2`; with `eps_hat`, `update / ((nu^e + eps) / (1 - b2^t)^e)`.
    Unlike `optax.scale_by_adam` it divides what earlier parts made of the gradient but squares the
    gradient itself. With correction this is Adam's magnitude, without RMSProp's, with `b2 = 1`
    (a sum, uncorrected) AdaGrad's.

    With `microbatches`, `mean_j G_j^2` takes the place of `G^2`. With `debias` the inverse `1 / p`
    of a denominator p is corrected for the noise of this step's gradients, to
    `max(1 / p - Var / p^3, 0)` with Var that of the mean of `p_j`, each p with `G_j^2` in the place
    of the new statistic. Source of both: arXiv:2605.20756.

    Args:
      b2: Decay in [0, 1].
      eps: Added to the root; on the scale of the gradients. The default, that of track-3 result 35,
        is far below the root mean square of any real gradient.
      exponent: e, any positive number, or a function of the number of dimensions giving it.
      bias_correction: Whether to divide `nu` by `1 - b2^t`.
      weighted: Whether `w = 1 - b2`; False adds squares with weight 1, uncorrected.
      eps_hat: Whether eps is added before the bias correction instead of after it: the "epsilon
        hat" of Kingma and Ba (arXiv:1412.6980, end of section 2). In early steps it then counts
        `(1 - b2^t)^(-e)` times as much; without correction there is no difference.
      floor: Least `nu / (1 - b2^t)` that counts, on the scale of squared gradients.
      microbatches: Name, in the extra argument `further`, of a tree of the gradients of
        microbatches, see `blocked`; None squares the gradient itself.
      debias: Name of such a tree, of at least two microbatches; None corrects nothing.

    Returns:
      A part. Its state holds one stack `nu` per stack of blocks.

    Raises:
      ValueError: An option out of range; in `update`, no tree of such a name.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_second_moment(b2=0.5)
      >>> updates, state = tx.update(jnp.array([4.0, -9.0]), tx.init(jnp.zeros(2)))
      >>> updates.tolist()  # as Adam's first step
      [1.0, -1.0]
    """
    check_options(locals())
    average = Average(b2, bias_correction, weighted)

    def step(count: Array, b: Blocks, nu: Array) -> tuple[Blocks, Array]:
        e = exponent(b.ndim) if callable(exponent) else exponent
        check_exponent("exponent", e)
        correction = average.correction(count, nu.dtype)
        squares = b.gradient**2
        if microbatches is not None:
            squares = jnp.mean(microbatches_of(b, microbatches) ** 2, 1)
        new = average.add(nu, squares)
        if eps_hat:
            root = (_power(new, e) + eps) / _power(correction, e)
        else:
            moment = new / correction if is_off(floor) else jnp.maximum(new / correction, floor)
            root = _power(moment, e) + eps
        # 0/0 where a gradient has been zero so far and eps is 0 or underflows.
        safe = jnp.where(root > 0, root, 1.0)
        quotient = jnp.where(root > 0, b.update / safe, 0.0)
        if debias is not None:
            moments = average.add(nu[:, None], microbatches_of(b, debias, 2) ** 2)
            roots = _power(moments / correction, e)
            # Relative to the denominator, whose cube may be outside of the range of float32.
            variance = variance_of_mean(roots / safe[:, None], 1)
            quotient *= debiased(jnp.ones_like(root), 1.0, variance)
        return dataclasses.replace(b, update=quotient.astype(b.update.dtype)), new

    return counted(ScaleBySecondMomentState, lambda p: jnp.zeros_like(p.update), step)


def _power(x: Array, exponent: float) -> Array:
    return jnp.sqrt(x) if exponent == 0.5 else x**exponent


def make_magnitude(
    graft: str | optax.GradientTransformation | None, b2: Any
) -> optax.GradientTransformation | None:
    """The magnitude of a name, or any Optax transformation lifted onto the raw gradient.

    Args:
      graft: `"adam"`, `"rmsprop"`, `"adagrad"`, `"sgd"`, None for no grafting, a part of stacks,
        or a stock transformation, which then sees raw gradients.
      b2: Decay of the second moment of adam and rmsprop; where it is 1, which sums, 0.999.

    Returns:
      A part, or None.

    Raises:
      ValueError: An unknown name, or a complete optimizer: its learning rate would count twice.
    """
    if graft is None or isinstance(graft, Part):
        return graft
    if not isinstance(graft, str):
        check_transform("graft", graft)
        _refuse_descent(graft)
        return from_gradients(graft)
    check_choice("graft", graft, ("adam", "rmsprop", "adagrad", "sgd"))
    if graft == "sgd":
        return optax.identity()
    if graft == "adagrad":
        return scale_by_second_moment(1.0)
    decay = (0.999 if b2 == 1 else b2) if is_number(b2) else jnp.where(b2 == 1, 0.999, b2)
    return scale_by_second_moment(decay, bias_correction=graft == "adam")


def _refuse_descent(tx: optax.GradientTransformation) -> None:
    """Raises ValueError for a transformation whose update points against the gradient."""
    with jax.ensure_compile_time_eval():
        gradient = jnp.ones((2, 2))
        state, update = tx.init(gradient), jnp.zeros((2, 2))
        for _ in range(LOOKS):
            try:
                update, state = tx.update(gradient, state, gradient)
            except TypeError:  # it asks for extra arguments, which are not known before a step
                return
            if bool((update != 0).any()):
                break
        if not bool((update > 0).all()):
            ends = "points against the gradient" if bool((update < 0).any()) else "is zero"
            raise ValueError(
                f"graft={tx} is a complete optimizer, its update {ends}: give a direction without "
                "learning rate, optax.scale_by_adam() for optax.adam(...)."
            )
