"""Updates and the norms of their parameters: floors, a brake, decay where the two agree."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import NOT_NEGATIVE, check_options, check_transform
from shampoo_jax.base.paths import KeyPath, name_of
from shampoo_jax.optimizers.hyperball import of_updates_and_params, wide
from shampoo_jax.optimizers.weight_decay import ScalarOrSchedule, value_at

Array = jax.Array


def floor_update(
    ratio: float | Array, axis: int | Sequence[int] | None = None
) -> optax.GradientTransformation:
    """Lengthens an update that is short beside its parameter: the update/weight floor.

    `U <- U * max(1, ratio * |W| / |U|)`, with the norms of the whole, or of each slice along `axis`
    by itself; 0 stays 0.

    Args:
      ratio: Least length of an update relative to the parameter, not negative.
      axis: Axis, or axes, whose entries have norms of their own: -1 for the outputs of an
        (in, out) kernel, 0 where kernels are (out, in) or layers are stacked. None for none.

    Returns:
      A transformation without state that needs `params`; updates keep their dtype, norms are in
      float32 or wider.

    Raises:
      ValueError: A negative ratio; in `update`, an axis that a parameter does not have.

    Source: modded-nanogpt track 3, results #44 (0.3825, whole matrices) and #46 (each row).

    Example:
      >>> import jax.numpy as jnp
      >>> tx = floor_update(0.5, axis=0)
      >>> w, u = jnp.array([[6.0, 8.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [1.0, 0.0]])
      >>> tx.update(u, tx.init(w), w)[0].tolist()
      [[5.0, 0.0], [1.0, 0.0]]
    """
    NOT_NEGATIVE("ratio", ratio)
    kept = () if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)

    def lengthen(update: Array, parameter: Array) -> Array:
        if any(not -update.ndim <= a < update.ndim for a in kept):
            raise ValueError(f"axis={axis} of an update of shape {update.shape}: it has no such.")
        others = tuple(a for a in range(update.ndim) if a not in {k % update.ndim for k in kept})
        length, target = _lengths(wide(update), others), ratio * _lengths(wide(parameter), others)
        factor = jnp.maximum(1.0, target / jnp.where(length > 0, length, 1.0))
        return (update * jnp.where(length > 0, factor, 1.0)).astype(update.dtype)

    return of_updates_and_params(lengthen)


def radial_brake(
    outward: float | Array = 0.5, inward: float | Array = 1.0, *, floor: float | Array = 1e-6
) -> optax.GradientTransformation:
    """Scales the part of an update along its parameter, which changes its norm.

    With `k = <U, W> / max(|W|, floor)^2`: `U <- U - k W + f k W`, f `outward` where k < 0, so that
    the step `-lr U` would lengthen W, and `inward` where it would shorten it. A parameter that is 0
    has no such part.

    Args:
      outward: Share that is left where the norm would grow.
      inward: Share that is left where it would shrink.
      floor: Norm, on the scale of parameters, below which the brake is released: a parameter that
        has just left 0 has to grow.

    Returns:
      A transformation without state that needs `params`; updates keep their dtype, to which they
      are rounded once. A parameter has one norm, whatever its axes.

    Raises:
      ValueError: A negative share or floor.

    Source: modded-nanogpt track 3, result #44, with these numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = radial_brake(outward=0.5)
      >>> w, u = jnp.array([2.0, 0.0]), jnp.array([-1.0, 3.0])
      >>> tx.update(u, tx.init(w), w)[0].tolist()
      [-0.5, 3.0]
    """
    NOT_NEGATIVE("outward", outward)
    NOT_NEGATIVE("inward", inward)
    NOT_NEGATIVE("floor", floor)

    def brake(update: Array, parameter: Array) -> Array:
        u, w = wide(update), wide(parameter)
        length = jnp.maximum(jnp.linalg.norm(w), floor)
        along = w / jnp.where(length > 0, length, 1.0)
        k = jnp.sum(u * along)
        return (u + (jnp.where(k < 0, outward, inward) - 1) * k * along).astype(update.dtype)

    return of_updates_and_params(brake)


def cautious_decay(
    weight_decay: ScalarOrSchedule,
    learning_rate: ScalarOrSchedule,
    steps: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """Decays the entries of a parameter that its update moves towards 0 anyway, after the step.

    With U the incoming direction, and D the step that `steps` makes of it: `W <- (W + D) (1 - lr
    weight_decay [U W > 0])`. So it stays outside of whatever holds norms, `keep_radius` say.

    Args:
      weight_decay: Strength; number or schedule of the step, counted from 0.
      learning_rate: The one that `steps` applies, likewise.
      steps: From a direction to a step; None means `optax.scale_by_learning_rate(learning_rate)`.

    Returns:
      A transformation that needs `params`, to be placed last; its state is a step count and that of
      `steps`.

    Raises:
      ValueError: A negative decay or rate, `steps` that are no transformation.

    Source: modded-nanogpt track 3, result #46 (0.025); arXiv:2510.12402.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = cautious_decay(0.5, 0.5)
      >>> w, u = jnp.array([4.0, 4.0]), jnp.array([1.0, -1.0])
      >>> step, _ = tx.update(u, tx.init(w), w)
      >>> (w + step).tolist()  # 3.5 and 4.5, of which the first decays by a quarter
      [2.625, 4.5]
    """
    check_options({"weight_decay": weight_decay, "learning_rate": learning_rate})
    inner = optax.scale_by_learning_rate(learning_rate) if steps is None else steps
    check_transform("steps", inner)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> tuple[Array, Any]:
        return jnp.zeros([], jnp.int32), inner.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        count, before = state
        made, after = inner.update(updates, before, params, **extra)
        lost = value_at(weight_decay, count) * value_at(learning_rate, count)

        def decay(path: KeyPath, step: Array | None, u: Array, p: Array) -> Array | None:
            if step is None:
                return None
            if jnp.shape(u) != jnp.shape(p):
                raise ValueError(f"parameter {name_of(path)!r} has another shape than its update.")
            mask = wide(u) * wide(p) > 0
            shrunk = jnp.where(mask, lost * (wide(p) + wide(step)), 0.0)
            return (wide(step) - shrunk).astype(step.dtype)

        if params is None:
            raise ValueError("params=None: parameters decay, pass them to update.")
        none = lambda x: x is None  # noqa: E731
        made = jax.tree_util.tree_map_with_path(decay, made, updates, params, is_leaf=none)
        return made, (optax.safe_increment(count), after)

    return optax.GradientTransformationExtraArgs(init, update)


def _lengths(x: Array, axes: tuple[int, ...]) -> Array:
    """Frobenius norms over some axes, which stay; free of overflow."""
    largest = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0.0)
    scale = jnp.where(largest > 0, largest, 1.0)
    return scale * jnp.sqrt(jnp.sum((x / scale) ** 2, axes, keepdims=True))
