"""Weight decay relative to the peak of the learning rate, and where each kind of decay belongs."""

import dataclasses
from typing import Any

import jax
import optax

from shampoo_jax.base.options import (
    Scalar,
    check_choice,
    check_flag,
    check_kind,
    check_options,
    is_number,
)
from shampoo_jax.stacks.guard import in_float32

ScalarOrSchedule = Scalar | optax.Schedule

RELATIVE_KINDS = ("lr_over_peak", "over_peak")
Parts = list[optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Decay:
    """What kind of weight decay an optimizer has.

    The kind is that of the matrices, which a direction takes. All other parameters decay as AdamW
    has it, decoupled, whatever the kind; `others` replaces that.

    Attributes:
      kind: `"decoupled"` adds `weight_decay * W` to the direction, `"l2"` to the gradients;
        `"lr_over_peak"` and `"over_peak"` are relative to the largest learning rate, see
        `add_scheduled_weight_decay`.
      peak_lr: Largest learning rate, for the two relative kinds; None means the learning rate, if
        that is a number.
      mask: Tree of booleans, or function of parameters giving one: what is to decay, of matrices
        and others; None for all.

    Raises:
      ValueError: An unknown kind, or a peak that the kind does not divide by.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.shampoo(0.1, weight_decay=1e-4, decay=shampoo_jax.Decay("l2"))
    """

    kind: str = "decoupled"
    peak_lr: Any = None
    mask: Any = None

    def __post_init__(self) -> None:
        """Raises ValueError for a field that makes no sense."""
        check_choice("kind", self.kind, ("l2", "decoupled", *RELATIVE_KINDS))
        check_options({"peak_lr": self.peak_lr})
        if not callable(self.mask):
            for leaf in jax.tree.leaves(self.mask):
                check_flag("mask", leaf)
        if self.peak_lr is not None and self.kind not in RELATIVE_KINDS:
            raise ValueError(
                f"peak_lr={self.peak_lr} with kind={self.kind!r}: only 'lr_over_peak' and "
                "'over_peak' divide by it, choose one of them or drop peak_lr."
            )


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
      >>> from shampoo_jax import add_scheduled_weight_decay
      >>> lr = optax.linear_schedule(0.1, 0.0, 4)
      >>> tx = add_scheduled_weight_decay(0.5, lr, kind="lr_over_peak", peak_lr=0.1)
      >>> params, zero = jnp.array(2.0), jnp.array(0.0)
      >>> state = tx.init(params)
      >>> first, state = tx.update(zero, state, params)
      >>> second, state = tx.update(zero, state, params)
      >>> float(first), float(second)
      (1.0, 0.75)
    """
    check_choice("kind", kind, RELATIVE_KINDS)
    decay = Decay(kind, peak_lr, mask)
    return in_float32(_relative(weight_decay, learning_rate, decay))


def _relative(
    weight_decay: ScalarOrSchedule, learning_rate: ScalarOrSchedule, decay: Decay
) -> optax.GradientTransformation:
    check_options({"weight_decay": weight_decay})
    peak = _peak(learning_rate, decay)

    def alpha(count: Any) -> Any:
        share = value_at(learning_rate, count) if decay.kind == "lr_over_peak" else 1.0
        return value_at(weight_decay, count) * share / peak

    return optax.add_decayed_weights(alpha, decay.mask)


def decay_parts(
    weight_decay: ScalarOrSchedule,
    decay: Decay | None = None,
    learning_rate: ScalarOrSchedule | None = None,
) -> tuple[Parts, Parts]:
    """The transformation of one kind of weight decay, sorted by its place in a chain.

    `optax.chain(*before, direction, *after, momentum, scale_by_learning_rate)`.

    Args:
      weight_decay: Non-negative number, array or schedule.
      decay: The kind, its peak and its mask; None means `Decay()`, decoupled.
      learning_rate: The one that multiplies the direction later, for the relative kinds.

    Returns:
      (before, after): what is applied to gradients, and what is applied to the direction. One list
      holds one transformation, the other none. They compute in float32 or wider and keep the dtype
      of updates.

    Raises:
      ValueError: A negative decay, a missing peak or one that is not positive.

    Example:
      >>> from shampoo_jax import Decay, decay_parts
      >>> before, after = decay_parts(0.1, Decay("l2"))
      >>> len(before), len(after)
      (1, 0)
    """
    before, after = wide_decay_parts(weight_decay, decay, learning_rate)
    return [in_float32(tx) for tx in before], [in_float32(tx) for tx in after]


def wide_decay_parts(
    weight_decay: ScalarOrSchedule, decay: Decay | None, learning_rate: Any
) -> tuple[Parts, Parts]:
    """`decay_parts` of trees that are in float32 or wider already."""
    check_kind("decay", decay, Decay, "Decay('l2')")
    decay = Decay() if decay is None else decay
    if learning_rate is not None:
        check_options({"learning_rate": learning_rate})
    if decay.kind in RELATIVE_KINDS:
        return [], [_relative(weight_decay, learning_rate, decay)]
    check_options({"weight_decay": weight_decay})
    part = optax.add_decayed_weights(weight_decay, decay.mask)
    return ([part], []) if decay.kind == "l2" else ([], [part])


def value_at(value: Any, count: Any) -> Any:
    """A schedule's value at step `count`, or the number or array itself."""
    return value(count) if callable(value) else value


def _peak(learning_rate: Any, decay: Decay) -> Any:
    peak = learning_rate if decay.peak_lr is None else decay.peak_lr
    if decay.peak_lr is None and not is_number(peak):
        raise ValueError(
            f"weight decay of kind {decay.kind!r} needs peak_lr, the largest value of the learning "
            "rate, because learning_rate is a schedule or an array: pass Decay(kind, peak_lr)."
        )
    if is_number(peak) and not peak > 0:
        raise ValueError(f"peak_lr={peak} must be positive: weight decay is divided by it.")
    return peak
