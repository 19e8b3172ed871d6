"""Weight decay relative to the peak of the learning rate, and where each kind of decay belongs."""

from typing import Any

import jax
import optax

from shampoo_jax.base.precision import in_float32

Scalar = float | jax.Array
ScalarOrSchedule = Scalar | optax.Schedule

RELATIVE_KINDS = ("lr_over_peak", "over_peak")
KINDS = ("l2", "decoupled", *RELATIVE_KINDS)


def add_scheduled_weight_decay(
    weight_decay: ScalarOrSchedule,
    learning_rate: ScalarOrSchedule,
    *,
    kind: str,
    peak_lr: Scalar | None = None,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds `alpha * params` to the direction, with `alpha` relative to the peak learning rate.

      `"lr_over_peak"`: `alpha = weight_decay * lr(t) / peak_lr`
      `"over_peak"`: `alpha = weight_decay / peak_lr`

    It stands in front of the (negated) learning rate, as `optax.add_decayed_weights` does in
    `optax.adamw`, so a step shrinks parameters by `lr(t) * alpha`. With `"over_peak"` that is
    `weight_decay * lr(t) / peak_lr`, the same for every peak: decay and learning rate can be tuned
    independently (Loshchilov and Hutter 2019, arXiv:1711.05101). With `"lr_over_peak"` the
    shrinking follows the square of the schedule, which keeps the ratio of gradient norm to weight
    norm steady (Defazio 2025, arXiv:2506.02285).

    The two plain kinds need nothing new: `optax.add_decayed_weights` after the direction is
    decoupled decay, before it, on the gradients, L2 regularization. See `decay_parts`.

    Args:
      weight_decay: Non-negative number, array or schedule.
      learning_rate: The one that multiplies the direction later: number, array or schedule of the
        step, which is counted from 0.
      kind: `"lr_over_peak"` or `"over_peak"`.
      peak_lr: Largest value of the learning rate. None means `learning_rate`, if that is a number.
      mask: Tree of booleans, or function of parameters giving one: what is to decay.

    Returns:
      A transformation that needs `params`; computes in float32 or wider, keeps the dtype of the
      updates. Its state is a step count.

    Raises:
      ValueError: An unknown kind, a negative decay, a peak that is not positive, or no peak beside
        a learning rate that is a schedule or an array.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from shampoo_jax.optimizers.weight_decay import add_scheduled_weight_decay
      >>> lr = optax.linear_schedule(0.1, 0.0, 4)
      >>> tx = add_scheduled_weight_decay(0.5, lr, kind="lr_over_peak", peak_lr=0.1)
      >>> params, zero = jnp.array(2.0), jnp.array(0.0)
      >>> state = tx.init(params)
      >>> first, state = tx.update(zero, state, params)
      >>> second, state = tx.update(zero, state, params)
      >>> float(first), float(second)
      (1.0, 0.75)
    """
    if kind not in RELATIVE_KINDS:
        raise ValueError(
            f"kind={kind!r} must be one of {', '.join(RELATIVE_KINDS)}; for l2 and decoupled decay "
            "use optax.add_decayed_weights, before or after the direction."
        )
    _check_weight_decay(weight_decay)
    peak = _peak(learning_rate, peak_lr, kind)

    def alpha(count: Any) -> Any:
        share = value_at(learning_rate, count) if kind == "lr_over_peak" else 1.0
        return value_at(weight_decay, count) * share / peak

    return in_float32(optax.add_decayed_weights(alpha, mask))


def decay_parts(
    kind: str,
    weight_decay: ScalarOrSchedule,
    learning_rate: ScalarOrSchedule,
    peak_lr: Scalar | None = None,
    mask: Any = None,
) -> tuple[list[optax.GradientTransformation], list[optax.GradientTransformation]]:
    """The transformation of one kind of weight decay, sorted by its place in a chain.

    `optax.chain(*before, direction, *after, momentum, scale_by_learning_rate)`.

    Args:
      kind: `"l2"`, `"decoupled"`, `"lr_over_peak"` or `"over_peak"`.
      weight_decay: Non-negative number, array or schedule.
      learning_rate: See `add_scheduled_weight_decay`; the plain kinds do not read it.
      peak_lr: Likewise.
      mask: Tree of booleans, or function of parameters giving one: what is to decay.

    Returns:
      (before, after): what is applied to gradients, and what is applied to the direction. One list
      holds one transformation, the other none.

    Raises:
      ValueError: An unknown kind, a negative decay, a missing peak or one that is not positive.

    Example:
      >>> from shampoo_jax.optimizers.weight_decay import decay_parts
      >>> before, after = decay_parts("l2", 0.1, 0.01)
      >>> len(before), len(after)
      (1, 0)
    """
    if kind not in KINDS:
        raise ValueError(f"weight decay kind={kind!r} is unknown: choose from {', '.join(KINDS)}.")
    if kind in RELATIVE_KINDS:
        part = add_scheduled_weight_decay(
            weight_decay, learning_rate, kind=kind, peak_lr=peak_lr, mask=mask
        )
        return [], [part]
    _check_weight_decay(weight_decay)
    part = in_float32(optax.add_decayed_weights(weight_decay, mask))
    return ([part], []) if kind == "l2" else ([], [part])


def value_at(value: Any, count: Any) -> Any:
    """A schedule's value at step `count`, or the number or array itself."""
    return value(count) if callable(value) else value


def _check_weight_decay(value: Any) -> None:
    if isinstance(value, (int, float)) and not value >= 0:
        raise ValueError(f"weight_decay={value} must not be negative.")


def _peak(learning_rate: Any, peak_lr: Any, kind: str) -> Any:
    if peak_lr is None:
        if not isinstance(learning_rate, (int, float)):
            raise ValueError(
                f"weight decay of kind {kind!r} needs peak_lr, the largest value of the learning "
                "rate, because learning_rate is a schedule or an array: pass peak_lr=..."
            )
        peak_lr = learning_rate
    if isinstance(peak_lr, (int, float)) and not peak_lr > 0:
        raise ValueError(f"peak_lr={peak_lr} must be positive: weight decay is divided by it.")
    return peak_lr
