"""Complete optimizers: a direction, weight decay, momentum, learning rate and routing."""

from typing import Any

import optax

from shampoo_jax.directions import scale_by_shampoo
from shampoo_jax.exponents import ExponentOption
from shampoo_jax.plan import DimensionRule
from shampoo_jax.routing import Rule, assemble
from shampoo_jax.solvers import Solver


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.9,
    *,
    b3: Any = None,
    bias_correction: bool = True,
    block_size: int | None = 1024,
    merge: int | None = 2,
    dimension_numbers: DimensionRule | None = None,
    exponents: ExponentOption = None,
    solver: str | Solver = "eigh",
    cutoff: str = "relative",
    rtol: Any = None,
    atol: Any = 0.0,
    eps: Any = 0.0,
    every: Any = 1,
    start: Any = None,
    graft: str | optax.GradientTransformation | None = "adam",
    graft_b2: Any = None,
    graft_eps: Any = 1e-15,
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
) -> optax.GradientTransformationExtraArgs:
    """Shampoo on matrices, AdamW on everything else.

    `U = scale_by_shampoo(G) + weight_decay * W`, then `W -= learning_rate * U`. A gradient with a
    NaN or an infinity anywhere skips the whole step by default. A gradient that is None leaves its
    parameter and its state alone. Multiplying every gradient by a constant changes nothing beyond
    rounding.

    Args:
      learning_rate: Number or schedule. With Adam grafting, start from AdamW's.
      b1: Decay of the first moment.
      b2: Decay of the factors.
      b3: See `scale_by_shampoo`, as for the following options up to `graft_eps`.
      bias_correction: See `scale_by_shampoo`.
      block_size: See `scale_by_shampoo`.
      merge: See `scale_by_shampoo`.
      dimension_numbers: See `scale_by_shampoo`.
      exponents: See `scale_by_shampoo`.
      solver: See `scale_by_shampoo`.
      cutoff: See `scale_by_shampoo`.
      rtol: See `scale_by_shampoo`.
      atol: See `scale_by_shampoo`.
      eps: See `scale_by_shampoo`.
      every: See `scale_by_shampoo`.
      start: See `scale_by_shampoo`.
      graft: See `scale_by_shampoo`.
      graft_b2: See `scale_by_shampoo`.
      graft_eps: See `scale_by_shampoo`.
      weight_decay: Strength of the decay of matrices.
      weight_decay_kind: `"decoupled"`, `"l2"`, `"lr_over_peak"` or `"over_peak"`, see
        `add_scheduled_weight_decay`.
      peak_lr: Largest learning rate, for the two relative kinds.
      mask: Which parameters decay: tree of booleans or function of parameters.
      momentum: Decay of heavy-ball momentum on the finished direction; None for none.
      dampening: See `momentum`.
      nesterov: See `momentum`.
      preconditioned: Callable of (path, leaf): whether Shampoo takes this parameter. None means
        `routing.is_hidden_matrix`.
      adamw_learning_rate: Learning rate of the others; None means `learning_rate`.
      adamw_b1: Decay of their first moment.
      adamw_b2: Decay of their second moment.
      adamw_eps: Their eps, on the scale of the gradients.
      adamw_weight_decay: Their decoupled decay; None means `weight_decay`.
      nonfinite: `"skip"` skips a step with any non-finite gradient; `"skip_blocks"` skips only the
        blocks it touches, see `scale_by_shampoo`; `"propagate"` does nothing.

    Returns:
      The optimizer. The number of skipped steps is `state.total_notfinite`.

    Raises:
      ValueError: An option out of range, or options that contradict each other.

    Example:
      >>> import jax, jax.numpy as jnp, optax, shampoo_jax
      >>> tx = shampoo_jax.shampoo(learning_rate=0.1, weight_decay=0.01)
      >>> params = {"w": jnp.eye(4), "bias": jnp.zeros(4)}
      >>> state = tx.init(params)
      >>> def loss(p):
      ...     return jnp.sum((p["w"] @ jnp.arange(4.0) + p["bias"] - 1.0) ** 2)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(40):
      ...     params, state = step(params, state)
      >>> bool(loss(params) < 0.1)
      True
    """
    direction = scale_by_shampoo(
        b1,
        b2,
        b3=b3,
        bias_correction=bias_correction,
        block_size=block_size,
        merge=merge,
        dimension_numbers=dimension_numbers,
        exponents=exponents,
        solver=solver,
        cutoff=cutoff,
        rtol=rtol,
        atol=atol,
        eps=eps,
        every=every,
        start=start,
        graft=graft,
        graft_b2=graft_b2,
        graft_eps=graft_eps,
        nonfinite="skip_blocks" if nonfinite == "skip_blocks" else "propagate",
    )
    return assemble(
        direction,
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_kind=weight_decay_kind,
        peak_lr=peak_lr,
        mask=mask,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        preconditioned=preconditioned,
        adamw_learning_rate=adamw_learning_rate,
        adamw_b1=adamw_b1,
        adamw_b2=adamw_b2,
        adamw_eps=adamw_eps,
        adamw_weight_decay=adamw_weight_decay,
        nonfinite=nonfinite,
    )
