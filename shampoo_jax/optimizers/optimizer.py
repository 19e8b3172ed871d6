"""From a direction to a complete optimizer: decay, momentum, learning rate, AdamW for the rest."""

from typing import Any, NamedTuple

import optax

from shampoo_jax.base.hyperparameters import checked
from shampoo_jax.base.options import Scalar, check_kind, check_options, check_range, is_transform
from shampoo_jax.base.signatures import suggests
from shampoo_jax.optimizers.momentum import momentum as momentum_part
from shampoo_jax.optimizers.routing import Rule, hidden_matrix_of, labels_by
from shampoo_jax.optimizers.weight_decay import Decay, wide_decay_parts
from shampoo_jax.stacks.guard import Guarded, guard, unguarded
from shampoo_jax.stacks.placement import Placement


class Routed(NamedTuple):
    """What an optimizer was built from, for `explain`.

    Attributes:
      direction: The design of its direction; None where that is not known.
      rule: Which parameters the direction takes.
      placement: Where its state lies; None on one device.
      momentum: Whether it has any.
      others_rate: By which AdamW's rate is multiplied; None where another optimizer was given.
      rebuild: The same optimizer for another placement.
    """

    direction: Any
    rule: Rule
    placement: Placement | None
    momentum: bool
    others_rate: Scalar | None
    rebuild: Any


@suggests
def as_optimizer(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: Any = 0.0,
    decay: Decay | None = None,
    momentum: float | optax.GradientTransformation | None = None,
    preconditioned: Rule | None = None,
    others_rate: Scalar | None = None,
    others: optax.GradientTransformation | None = None,
    placement: Placement | None = None,
) -> Guarded:
    """A complete optimizer: a direction on matrices, AdamW on everything else.

    `U = direction(G) + weight_decay * W`, momentum if asked for, then `W -= learning_rate * U`.
    Gradients that are missing, narrow or not finite are dealt with before, see `guard`.

    Args:
      direction: Any transformation of trees of matrices without learning rate and decay.
      learning_rate: Number or schedule.
      weight_decay: Strength of the decay, of all parameters.
      decay: Its kind, on matrices alone, and mask; None means `Decay()`, decoupled.
      momentum: Decay of heavy-ball momentum on the finished direction, or a transformation such as
        `momentum(0.9, nesterov=True)`; None for none.
      preconditioned: Callable of (path, leaf): whether the direction takes this parameter. None
        means `is_hidden_matrix`.
      others_rate: Learning rate of the other parameters as a multiple of `learning_rate`; their
        decay in a step, `learning_rate * weight_decay`, is not multiplied. None means 1.
      others: Optimizer of the other parameters, learning rate included; None means `optax.nadamw`
        with `others_rate`, the same decay and mask, b1 0.9, b2 0.95 and eps 1e-15.
      placement: Splits momentum and the state and arithmetic of `others` over the owners of a mesh,
        as the direction does with blocks; None means the direction's own.

    Returns:
      The optimizer. It computes in float32 or wider; updates have the dtype of the gradients.

    Raises:
      ValueError: An option out of range, or options that contradict each other.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = as_optimizer(optax.scale_by_sign(), 0.1, weight_decay=0.5)
      >>> params = {"w": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> updates["w"].round(3).tolist()  # -0.1 * (1 + 0.5)
      [[-0.15, -0.15], [-0.15, -0.15]]
    """
    options: dict[str, Any] = checked(locals())
    _check(options)
    design = direction.design if isinstance(direction, Guarded) else None
    placement = getattr(design, "placement", None) if placement is None else placement
    split = (lambda tx: tx) if placement is None else placement.elementwise
    before, after = wide_decay_parts(weight_decay, decay, learning_rate)
    if momentum is not None:
        if design is not None and placement is not None:
            # Or updates would be gathered for momentum and after it.
            direction = design.rebuild(placement.split_out)
        part = momentum if is_transform(momentum) else momentum_part(momentum)
        after = [split(optax.chain(*after, part))]
    rate = optax.scale_by_learning_rate(learning_rate)
    matrices = optax.chain(*before, unguarded(direction), *after, rate)
    if others is None:
        others_rate = 1.0 if others_rate is None else others_rate
        others = _nadamw(others_rate, weight_decay, decay and decay.mask, rate)
    rule = preconditioned
    if rule is None:
        # Batch axes that the direction is told of are no dimensions of a matrix.
        blocking = getattr(design, "blocking", None)
        rule = hidden_matrix_of(None if blocking is None else blocking.dimension_numbers)

    def rebuild(placement: Placement | None) -> optax.GradientTransformation:
        again: Any = direction if design is None else design.rebuild(placement)
        changed: dict[str, Any] = {"direction": again, "placement": placement}
        return as_optimizer(**(options | changed))

    tx = optax.partition({"matrices": matrices, "others": split(others)}, labels_by(rule))
    return guard(tx, Routed(design, rule, placement, momentum is not None, others_rate, rebuild))


def _nadamw(faster: Any, weight_decay: Any, mask: Any, rate: optax.GradientTransformation) -> Any:
    """`optax.nadamw`, state included, but for Adam's update being multiplied and the decay not.

    Looking ahead is worth .03 in docs/recipe.md, and Optax's Muon has it for these parameters.
    """
    adam = optax.scale_by_adam(b2=0.95, eps=1e-15, nesterov=True)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(updates, state, params)
        return optax.tree.scale(faster, updates), state

    multiplied = optax.GradientTransformation(adam.init, update)
    return optax.chain(multiplied, optax.add_decayed_weights(weight_decay, mask), rate)


def _check(options: dict[str, Any]) -> None:
    """Raises ValueError for options that are known by name here alone."""
    check_options({"others_rate": options["others_rate"]})
    if options["others_rate"] is not None and options["others"] is not None:
        raise ValueError(
            f"others_rate={options['others_rate']} beside others: an optimizer of one's own has "
            "its own learning rate, leave one of the two out."
        )
    momentum, example = options["momentum"], "Placement(mesh, owners='data')"
    if momentum is not None and not is_transform(momentum):
        check_range("momentum", momentum)
    check_kind("placement", options["placement"], Placement, example)
