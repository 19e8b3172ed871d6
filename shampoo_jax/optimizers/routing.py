"""Which parameters are preconditioned, and the optimizer that takes the others."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from shampoo_jax.base.hyperparameters import check_static
from shampoo_jax.base.options import check_options, is_off
from shampoo_jax.base.precision import check_real, in_float32
from shampoo_jax.blocks.dimension_numbers import component_names
from shampoo_jax.optimizers.momentum import momentum as momentum_part
from shampoo_jax.optimizers.weight_decay import decay_parts
from shampoo_jax.stacks.guard import (
    accept_missing,
    skip_nonfinite_parameters,
    skip_nonfinite_steps,
)
from shampoo_jax.stacks.placement import Placement

Rule = Callable[[tuple[Any, ...], Any], bool]

# Parameters whose rows are looked up or whose columns are vocabulary entries: two-dimensional, but
# their gradients are sparse or tall and Adam serves them as well for less.
_TABLES = re.compile(
    r"embed|vocab|logits|(^|_)emb($|_)|^w[tp]e$|^(?!(multi|attn|attention)_)(\w*_)?(lm)?head(_\d+)?$"
)


def is_hidden_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """The default rule: order 2 or more without unit dimensions, no bias, embedding or output head.

    Args:
      path: Key path of the parameter. A component that contains `embed`, `vocab`, `logits` or the
        word `emb`, is `wte` or `wpe`, or ends in the word `head` (but `multi_head`, `attn_head`),
        names a table. Slashes separate components, as in Haiku's names. A parameter `bias` or
        `scale` is a vector even where it has more axes (heads, scanned layers).
      leaf: The parameter or its shape.

    Returns:
      Whether Shampoo takes it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from shampoo_jax.optimizers.routing import is_hidden_matrix
      >>> params = {"attn": {"q": jnp.ones((4, 4))}, "lm_head": jnp.ones((4, 9)), "b": jnp.ones(4)}
      >>> jax.tree_util.tree_map_with_path(is_hidden_matrix, params)
      {'attn': {'q': True}, 'b': False, 'lm_head': False}
    """
    order = sum(d > 1 for d in np.shape(leaf))
    names = component_names(path)
    is_vector = names[-1:] in (["bias"], ["scale"])
    return order >= 2 and not is_vector and not any(_TABLES.search(name) for name in names)


def labels_by(rule: Rule) -> Callable[[Any], Any]:
    """`"matrices"` or `"others"` for every parameter, the labels that `optax.partition` wants.

    A complex parameter raises ValueError.
    """

    def label(path: tuple[Any, ...], leaf: Any) -> str:
        check_real(path, leaf)
        return "matrices" if rule(path, leaf) else "others"

    return lambda params: jax.tree_util.tree_map_with_path(label, params)


def complete(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: Any = 0.0,
    weight_decay_kind: str = "decoupled",
    peak_lr: Any = None,
    mask: Any = None,
    momentum: Any = None,
    dampening: Any = 0.0,
    nesterov: bool = False,
    preconditioned: Rule | None = None,
    adamw_learning_rate: optax.ScalarOrSchedule | None = None,
    adamw_b1: Any = 0.9,
    adamw_b2: Any = 0.95,
    adamw_eps: Any = 1e-15,
    adamw_weight_decay: Any = None,
    nonfinite: str = "skip",
    placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A complete optimizer: a direction on matrices, AdamW on everything else.

    `U = direction(G) + weight_decay * W`, momentum if asked for, then `W -= learning_rate * U`. A
    gradient that is None leaves its parameter and its state alone.

    Args:
      direction: Any transformation of trees of matrices without learning rate and decay.
      learning_rate: Number or schedule.
      weight_decay: Strength of the decay of matrices.
      weight_decay_kind: `"decoupled"`, `"l2"`, `"lr_over_peak"` or `"over_peak"`, see
        `add_scheduled_weight_decay`.
      peak_lr: Largest learning rate, for the two relative kinds.
      mask: Which parameters decay: tree of booleans or function of parameters.
      momentum: Decay of heavy-ball momentum on the finished direction; None for none.
      dampening: See `momentum`.
      nesterov: See `momentum`.
      preconditioned: Callable of (path, leaf): whether the direction takes this parameter. None
        means `is_hidden_matrix`.
      adamw_learning_rate: Learning rate of the others; None means `learning_rate`.
      adamw_b1: Decay of their first moment.
      adamw_b2: Decay of their second moment.
      adamw_eps: Their eps, on the scale of the gradients.
      adamw_weight_decay: Their decoupled decay; None means `weight_decay`.
      nonfinite: `"skip"` leaves parameters and state alone in a step with any non-finite gradient,
        and counts it in `state.total_notfinite`. `"skip_blocks"` leaves out the others that are
        affected and relies on `direction` to do likewise; decay and momentum of matrices go on.
        `"propagate"` does nothing. `check_finite` raises where something was skipped.
      placement: Splits momentum and AdamW's state and arithmetic over the owners of a mesh, as
        `direction` does with blocks if it has the same.

    Returns:
      The optimizer. It computes in float32 or wider; updates have the dtype of the gradients.

    Raises:
      ValueError: An option out of range, or options that contradict each other.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = complete(optax.scale_by_sign(), 0.1, weight_decay=0.5)
      >>> params = {"w": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> updates["w"].round(3).tolist()  # -0.1 * (1 + 0.5)
      [[-0.15, -0.15], [-0.15, -0.15]]
    """
    check_static(locals())
    check_options(locals())
    _check_pairs(weight_decay_kind, peak_lr, momentum, dampening, nesterov)
    if nonfinite not in ("skip", "skip_blocks", "propagate"):
        raise ValueError(f"nonfinite={nonfinite!r}: use 'skip', 'skip_blocks' or 'propagate'.")
    split = placement.elementwise if placement is not None else lambda tx: tx
    before, after = decay_parts(weight_decay_kind, weight_decay, learning_rate, peak_lr, mask)
    if momentum is not None:
        after = [split(optax.chain(*after, momentum_part(momentum, dampening, nesterov)))]
    matrices = optax.chain(*before, direction, *after, optax.scale_by_learning_rate(learning_rate))
    others = optax.adamw(
        learning_rate if adamw_learning_rate is None else adamw_learning_rate,
        b1=adamw_b1,
        b2=adamw_b2,
        eps=adamw_eps,
        weight_decay=weight_decay if adamw_weight_decay is None else adamw_weight_decay,
        mask=mask,
    )
    if nonfinite == "skip_blocks":
        others = skip_nonfinite_parameters(others)
    rule = is_hidden_matrix if preconditioned is None else preconditioned
    tx = optax.partition({"matrices": matrices, "others": split(others)}, labels_by(rule))
    tx = in_float32(tx)
    return accept_missing(skip_nonfinite_steps(tx) if nonfinite == "skip" else tx)


def _check_pairs(
    weight_decay_kind: str, peak_lr: Any, momentum: Any, dampening: Any, nesterov: bool
) -> None:
    """Raises ValueError for an option that another one leaves without effect."""
    if peak_lr is not None and weight_decay_kind in ("l2", "decoupled"):
        raise ValueError(
            f"peak_lr={peak_lr} with weight_decay_kind={weight_decay_kind!r}: only 'lr_over_peak' "
            "and 'over_peak' divide by it, choose one of them or drop peak_lr."
        )
    if momentum is None and (nesterov or not is_off(dampening)):
        raise ValueError(
            f"nesterov={nesterov}, dampening={dampening} without momentum: set momentum=..., or "
            "drop them."
        )
