"""Complete optimizers: each direction with decay, momentum, learning rate and routing around it."""

from collections.abc import Callable
from typing import Any, Literal

import optax
from jax.typing import DTypeLike

from shampoo_jax.base.options import Scalar, Whole
from shampoo_jax.base.signatures import suggests
from shampoo_jax.blocks.blocking import Blocking
from shampoo_jax.blocks.exponents import AutoExponents, ExponentOption, Side
from shampoo_jax.directions.kl import scale_by_kl_shampoo, scale_by_kl_soap
from shampoo_jax.directions.shampoo import scale_by_one_sided_shampoo, scale_by_shampoo
from shampoo_jax.directions.soap import WHOLE, scale_by_soap
from shampoo_jax.optimizers.optimizer import as_optimizer
from shampoo_jax.optimizers.routing import Rule
from shampoo_jax.optimizers.weight_decay import Decay, ScalarOrSchedule
from shampoo_jax.parts.refresh import BasisRefresh, Refresh
from shampoo_jax.solvers.bases import Basis
from shampoo_jax.solvers.solver import Solver
from shampoo_jax.stacks.guard import Guarded
from shampoo_jax.stacks.placement import Placement

# Options that are those of `as_optimizer`; all others are those of the direction.
OUTER = (
    *("learning_rate", "weight_decay", "decay", "momentum"),
    *("preconditioned", "others_rate", "others"),
)

# Embeddings, heads, biases and gains want larger rates than matrices whose updates have the size of
# Adam's: docs/recipe.md has what it is worth, and the rates of AdamW on track 3 are 4 to 700 times
# those of its matrices.
OTHERS_RATE = 4.0


def _others_rate(graft: Any) -> float | None:
    """The others' rate for a graft: larger where updates have the size of Adam's."""
    return OTHERS_RATE if isinstance(graft, str) and graft in ("adam", "rmsprop") else None


def _complete(
    direction: Callable[..., Guarded], options: dict[str, Any], others_rate: float | None = None
) -> Guarded:
    """The optimizer of an alias from all of its options, and the rate of the others by default."""
    outer = {name: options.pop(name) for name in OUTER}
    if outer["others"] is None and outer["others_rate"] is None:
        outer["others_rate"] = others_rate
    return as_optimizer(direction(**options), **outer)


@suggests
def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.9,
    *,
    b3: Scalar | None = None,
    bias_correction: bool = True,
    weighted: bool = True,
    blocking: Blocking | None = None,
    exponents: AutoExponents = "auto",
    statistics: Literal["gradients", "kl"] | optax.GradientTransformation = "gradients",
    solver: str | Solver = "eigh",
    every: Whole = 1,
    refresh: Refresh | None = None,
    mu_dtype: DTypeLike | None = None,
    root_dtype: DTypeLike | None = None,
    graft: str | optax.GradientTransformation | None = "adam",
    monitor: int | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    decay: Decay | None = None,
    momentum: float | optax.GradientTransformation | None = None,
    preconditioned: Rule | None = None,
    others_rate: Scalar | None = None,
    others: optax.GradientTransformation | None = None,
    placement: Placement | None = None,
) -> Guarded:
    """Shampoo on matrices, AdamW on everything else.

    See `scale_by_shampoo` for the direction. Multiplying every gradient by a constant changes
    nothing beyond rounding, with the exceptions that are named there.

    Args:
      learning_rate: Number or schedule. With Adam grafting, start from AdamW's.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the factors, in [0, 1]; 1 sums them.
      b3: Decay of the emitted first moment, see `filter_gradient`; None means `b1`.
      bias_correction: Whether first moment and factors are divided by the sum of their weights.
      weighted: Whether new statistics have weight `1 - b2`; False adds them with weight 1.
      blocking: How parameters are read and cut into blocks; None means `Blocking()`, blocks of up
        to 1024 x 1024.
      exponents: `e` of `S^(-e)`: None for `1 / (2 * ndim)`, a number for every dimension, a
        mapping from the number of dimensions of a block to a number or to a mapping from dimension
        to number, or a function of a block's shape. Exponent 0 leaves a dimension alone. `"left"`,
        `"right"` and `"smaller"` are one-sided Shampoo, see `scale_by_one_sided_shampoo`. `"auto"`
        is `{2: 1 / 3}`, and None for `statistics="kl"` and without a graft, where any other makes
        the scale of gradients matter.
      statistics: `"gradients"`, or `"kl"` for factors of the gradient preconditioned by the other
        dimensions' roots, see `accumulate_kl_factors`: KL-Shampoo with full factors, as Meta's
        package has it; with `exponents=0.5` the paper's iteration. It depends on the scale of the
        gradients. With a truncating solver, directions that no side has seen by the first refresh
        are never learned: use `solver="shifted_eigh"`, or `kl_shampoo(rtol=None)`, where supports
        may grow. Or a part that fills `Blocks.matrices`, see `scale_by_shampoo`.
      solver: A `Solver`, which carries cutoffs and damping, or the name of one with its defaults:
        `"eigh"` is `TruncatedEigh()`; `"polynomial"`, the same truncated root by matrix products,
        and the cheaper `"polynomial_clip"`; `"auto"`, the faster one of eigh and polynomial for
        backend and size, see `Auto`; `"shifted_eigh"`, `"coupled_newton"`,
        `"higher_order_newton"`; or one of `register_solver`. `TruncatedEigh(rtol=0.0)` is the
        literal rule of result 35.
      every: Steps between refreshes of the roots.
      refresh: First step that preconditions, and how refreshes are spread over steps and memory;
        None means `Refresh()`, from step `every` on.
      mu_dtype: Of the stored first moment; `jnp.bfloat16` halves it.
      root_dtype: Of the stored roots; `jnp.bfloat16` halves them. Factors stay in float32.
      graft: `"adam"`, `"rmsprop"`, `"adagrad"`, `"sgd"`, None, a part such as
        `scale_by_second_moment(b2, eps)`, or a stock Optax transformation without learning rate,
        `optax.scale_by_adam()` say, which then sees raw gradients. Named ones use `b2`, or 0.999
        where `b2` is 1, and eps 1e-15.
      monitor: Steps between records of the factors' spectra, see `read_monitor`; None for none.
      weight_decay: Strength of the decay, of all parameters.
      decay: Its kind, on matrices alone, and mask; None means `Decay()`, decoupled.
      momentum: Decay of heavy-ball momentum on the finished direction, or a transformation such as
        `momentum(0.9, nesterov=True)`; None for none.
      preconditioned: Callable of (path, leaf): whether Shampoo takes this parameter. None means
        `is_hidden_matrix`: matrices that are no embeddings, heads or biases.
      others_rate: Learning rate of the other parameters as a multiple of `learning_rate`; their
        decay in a step, `learning_rate * weight_decay`, is not multiplied. None means 4 with the
        grafts `"adam"` and `"rmsprop"`, whose updates are as large, and 1 with all others.
      others: Optimizer of the other parameters, learning rate included; None means `optax.nadamw`
        with `others_rate`, the same decay and mask, b1 0.9, b2 0.95 and eps 1e-15.
      placement: Mesh and axes over which blocks, momentum and the state of the other parameters
        are split; None means one device.

    Returns:
      The optimizer; its updates have the dtype of the gradients.

    Raises:
      ValueError: An option out of range, or options that contradict each other.
      TypeError: An option that it does not have; the nearest is named.

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
    return _complete(scale_by_shampoo, locals(), _others_rate(graft))


@suggests
def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    *,
    factor_b2: Scalar | None = None,
    eps: Scalar = 1e-8,
    bias_correction: bool = True,
    eps_hat: bool = False,
    blocking: Blocking | None = WHOLE,
    exponents: ExponentOption = "bounded",
    basis: str | Basis | None = None,
    every: Whole = 10,
    refresh: BasisRefresh | None = None,
    rtol: float | None = 0.0,
    graft: str | optax.GradientTransformation | None = None,
    mu_dtype: DTypeLike | None = None,
    monitor: int | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    decay: Decay | None = None,
    momentum: float | optax.GradientTransformation | None = None,
    preconditioned: Rule | None = None,
    others_rate: Scalar | None = None,
    others: optax.GradientTransformation | None = None,
    placement: Placement | None = None,
) -> Guarded:
    """SOAP on matrices, AdamW on everything else.

    See `scale_by_soap` for the direction; `as_optimizer(scale_by_soap(...), learning_rate)` for its
    rarer options.

    Args:
      learning_rate: Number or schedule; 3e-3 in the paper.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1]; 1 sums.
      factor_b2: Decay of the factors; None means `b2`.
      eps: Added to the denominator; on the scale of the gradients.
      bias_correction: Whether moments are divided by the sum of their weights.
      eps_hat: Whether eps is added before the bias correction, as in the authors' code, see
        `scale_by_second_moment`.
      blocking: How parameters are read and cut; by default, as the authors do, matrices are whole.
        None means `Blocking()`, blocks of up to 1024 x 1024.
      exponents: Dimensions with exponent 0 keep their basis; other values do not matter.
        `"bounded"` leaves alone those of more than 10,000, and the long side of very thin matrices;
        None leaves none alone.
      basis: `"eigh"`, `"qr"` (Meta's), a `Basis`, or None for the authors' sorted QR step.
      every: Steps between refreshes of the bases.
      refresh: When bases are refreshed, and what happens in the first step; None means the authors'
        `BasisRefresh()`.
      rtol: Directions whose eigenvalue is at most `rtol` times a factor's largest get a zero
        update; 0.0 truncates nothing, None means `d * eps` of the dtype.
      graft: Magnitude of every block, as in `scale_by_shampoo`; None leaves that of the direction.
      mu_dtype: Of the stored first moment; `jnp.bfloat16` halves it.
      monitor: Steps between records of the factors' spectra, see `read_monitor`; None for none.
      weight_decay: Strength of the decay, of all parameters.
      decay: Its kind, on matrices alone, and mask; None means `Decay()`, decoupled.
      momentum: Decay of heavy-ball momentum on the finished direction, or a transformation such as
        `momentum(0.9, nesterov=True)`; None for none.
      preconditioned: Callable of (path, leaf): whether SOAP takes this parameter. None means
        `is_hidden_matrix`: matrices that are no embeddings, heads or biases.
      others_rate: Learning rate of the other parameters as a multiple of `learning_rate`; their
        decay in a step, `learning_rate * weight_decay`, is not multiplied. None means 4, and 1
        with grafts other than `"adam"` and `"rmsprop"`.
      others: Optimizer of the other parameters, learning rate included; None means `optax.nadamw`
        with `others_rate`, the same decay and mask, b1 0.9, b2 0.95 and eps 1e-15.
      placement: Mesh and axes over which blocks, momentum and the state of the other parameters
        are split; None means one device.

    Returns:
      The optimizer; its updates have the dtype of the gradients.

    Raises:
      ValueError: An option out of range, or options that contradict each other.
      TypeError: An option that it does not have; the nearest is named.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.soap(3e-3, every=10, weight_decay=0.01)
    """
    return _complete(scale_by_soap, locals(), OTHERS_RATE if graft is None else _others_rate(graft))


@suggests
def kl_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.98,
    *,
    eps: Scalar = 1e-8,
    first_weight: Scalar | None = None,
    normalize: bool = True,
    bias_correction: bool = False,
    blocking: Blocking | None = WHOLE,
    exponents: ExponentOption = "bounded",
    basis: str | Basis | None = None,
    every: Whole = 10,
    refresh: BasisRefresh | None = None,
    max_scale: str | float = "relative",
    rtol: float | None = 0.0,
    mu_dtype: DTypeLike | None = None,
    monitor: int | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    decay: Decay | None = None,
    momentum: float | optax.GradientTransformation | None = None,
    preconditioned: Rule | None = None,
    others_rate: Scalar | None = None,
    others: optax.GradientTransformation | None = None,
    placement: Placement | None = None,
) -> Guarded:
    """KL-Shampoo on matrices, AdamW on everything else.

    See `scale_by_kl_shampoo` for the direction. With the authors' `max_scale="size"` it is not for
    a loss summed over tokens, nor for tiny gradients.

    Args:
      learning_rate: Number or schedule; 3e-3 in the paper's code.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of factors and eigenvalues, in [0, 1).
      eps: Damping of s.
      first_weight: Weight of the first gradient in the factors; None means `1 - b2`.
      normalize: Whether statistics are means over the other dimensions, not sums.
      bias_correction: Whether moments are divided by the sum of their weights. Eigenvalues have a
        first value, they need none.
      blocking: How parameters are read and cut; by default, as the authors do, matrices are whole.
        None means `Blocking()`, blocks of up to 1024 x 1024.
      exponents: Dimensions with exponent 0 are left alone; other values do not matter. `"bounded"`
        leaves alone those of more than 10,000, and the long side of very thin matrices; None leaves
        none alone.
      basis: `"eigh"`, `"qr"` or None for one unsorted QR step, or a `Basis` that keeps the order
        of columns.
      every: Steps between refreshes of the bases.
      refresh: When bases are refreshed, and what happens in the first step; None means the authors'
        `BasisRefresh()`.
      max_scale: Largest `d^(-1/2)`: `"relative"` makes eigenvalues relative to the gradients, see
        `kl_eigenbasis`; `"size"` means `max(10, min(d, 4000))`, the authors' choice, which binds
        where gradients are small (docs/recipe.md); or a number.
      rtol: Directions whose eigenvalue is at most `rtol` times a factor's largest get a zero
        update; 0.0 truncates nothing, None means `d * eps` of the dtype.
      mu_dtype: Of the stored first moment; `jnp.bfloat16` halves it.
      monitor: Steps between records of the factors' spectra, see `read_monitor`; None for none.
      weight_decay: Strength of the decay, of all parameters.
      decay: Its kind, on matrices alone, and mask; None means `Decay()`, decoupled.
      momentum: Decay of heavy-ball momentum on the finished direction, or a transformation such as
        `momentum(0.9, nesterov=True)`; None for none.
      preconditioned: Callable of (path, leaf): whether KL-Shampoo takes this parameter. None means
        `is_hidden_matrix`: matrices that are no embeddings, heads or biases.
      others_rate: Learning rate of the other parameters as a multiple of `learning_rate`; their
        decay in a step, `learning_rate * weight_decay`, is not multiplied. None means 4.
      others: Optimizer of the other parameters, learning rate included; None means `optax.nadamw`
        with `others_rate`, the same decay and mask, b1 0.9, b2 0.95 and eps 1e-15.
      placement: Mesh and axes over which blocks, momentum and the state of the other parameters
        are split; None means one device.

    Returns:
      The optimizer; its updates have the dtype of the gradients.

    Raises:
      ValueError: An option out of range, or options that contradict each other.
      TypeError: An option that it does not have; the nearest is named.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.kl_shampoo(1e-3, weight_decay=0.01)
    """
    return _complete(scale_by_kl_shampoo, locals(), OTHERS_RATE)


@suggests
def kl_soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.98,
    *,
    factor_b2: Scalar | None = None,
    eps: Scalar = 1e-8,
    normalize: bool = True,
    bias_correction: bool = False,
    blocking: Blocking | None = WHOLE,
    exponents: ExponentOption = "bounded",
    basis: str | Basis | None = None,
    every: Whole = 10,
    refresh: BasisRefresh | None = None,
    max_scale: str | float = "size",
    rtol: float | None = 0.0,
    mu_dtype: DTypeLike | None = None,
    monitor: int | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    decay: Decay | None = None,
    momentum: float | optax.GradientTransformation | None = None,
    preconditioned: Rule | None = None,
    others_rate: Scalar | None = None,
    others: optax.GradientTransformation | None = None,
    placement: Placement | None = None,
) -> Guarded:
    """KL-SOAP on matrices, AdamW on everything else.

    See `scale_by_kl_soap` for the direction; `as_optimizer(scale_by_kl_soap(...), learning_rate)`
    for its rarer options.

    Args:
      learning_rate: Number or schedule.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      factor_b2: Decay of factors and eigenvalues; None means `b2`.
      eps: Added to the denominator; on the scale of the gradients.
      normalize: Whether statistics are means over the other dimensions, not sums.
      bias_correction: Whether moments are divided by the sum of their weights. Eigenvalues have a
        first value, they need none.
      blocking: How parameters are read and cut; by default, as the authors do, matrices are whole.
        None means `Blocking()`, blocks of up to 1024 x 1024.
      exponents: Dimensions with exponent 0 are left alone; other values do not matter. `"bounded"`
        leaves alone those of more than 10,000, and the long side of very thin matrices; None leaves
        none alone.
      basis: `"eigh"`, `"qr"` or None for one unsorted QR step, or a `Basis` that keeps the order
        of columns.
      every: Steps between refreshes of the bases.
      refresh: When bases are refreshed, and what happens in the first step; None means the authors'
        `BasisRefresh()`.
      max_scale: Largest `d^(-1/2)`: `"size"` means `max(10, min(d, 4000))`, the authors' choice.
        `"relative"` makes eigenvalues relative to the gradients, see `kl_eigenbasis`.
      rtol: Directions whose eigenvalue is at most `rtol` times a factor's largest get a zero
        update; 0.0 truncates nothing, None means `d * eps` of the dtype.
      mu_dtype: Of the stored first moment; `jnp.bfloat16` halves it.
      monitor: Steps between records of the factors' spectra, see `read_monitor`; None for none.
      weight_decay: Strength of the decay, of all parameters.
      decay: Its kind, on matrices alone, and mask; None means `Decay()`, decoupled.
      momentum: Decay of heavy-ball momentum on the finished direction, or a transformation such as
        `momentum(0.9, nesterov=True)`; None for none.
      preconditioned: Callable of (path, leaf): whether KL-SOAP takes this parameter. None means
        `is_hidden_matrix`: matrices that are no embeddings, heads or biases.
      others_rate: Learning rate of the other parameters as a multiple of `learning_rate`; their
        decay in a step, `learning_rate * weight_decay`, is not multiplied. None means 4.
      others: Optimizer of the other parameters, learning rate included; None means `optax.nadamw`
        with `others_rate`, the same decay and mask, b1 0.9, b2 0.95 and eps 1e-15.
      placement: Mesh and axes over which blocks, momentum and the state of the other parameters
        are split; None means one device.

    Returns:
      The optimizer; its updates have the dtype of the gradients.

    Raises:
      ValueError: An option out of range, or options that contradict each other.
      TypeError: An option that it does not have; the nearest is named.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.kl_soap(1e-3, weight_decay=0.01)
    """
    return _complete(scale_by_kl_soap, locals(), OTHERS_RATE)


@suggests
def one_sided_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    *,
    side: Side = "right",
    bias_correction: bool = True,
    blocking: Blocking | None = None,
    solver: str | Solver = "eigh",
    every: Whole = 1,
    refresh: Refresh | None = None,
    mu_dtype: DTypeLike | None = None,
    root_dtype: DTypeLike | None = None,
    graft: str | optax.GradientTransformation | None = None,
    monitor: int | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    decay: Decay | None = None,
    momentum: float | optax.GradientTransformation | None = None,
    preconditioned: Rule | None = None,
    others_rate: Scalar | None = None,
    others: optax.GradientTransformation | None = None,
    placement: Placement | None = None,
) -> Guarded:
    """One-sided Shampoo (ASGO) on matrices, AdamW on everything else.

    See `scale_by_one_sided_shampoo` for the direction.

    Args:
      learning_rate: Number or schedule.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the factor, in [0, 1]; 1 sums.
      side: `"right"` preconditions the last dimension of a matrix, or of a block of however many,
        `"left"` the first, `"smaller"` the smallest of each block, the last one of a square: the
        cheapest. With `"smaller"` the other dimensions, without factors, are not cut.
      bias_correction: Whether first moment and factor are divided by the sum of their weights.
      blocking: How parameters are read and cut into blocks; None means `Blocking()`.
      solver: A `Solver` or the name of one, for an exponent of 1/2; `"eigh"` truncates.
      every: Steps between refreshes of the roots.
      refresh: First step that preconditions, and how refreshes are spread; None means `Refresh()`.
      mu_dtype: Of the stored first moment; `jnp.bfloat16` halves it.
      root_dtype: Of the stored roots; `jnp.bfloat16` halves them.
      graft: Magnitude of every block, `"adam"` say; None leaves that of the direction.
      monitor: Steps between records of the factors' spectra, see `read_monitor`; None for none.
      weight_decay: Strength of the decay, of all parameters.
      decay: Its kind, on matrices alone, and mask; None means `Decay()`, decoupled.
      momentum: Decay of heavy-ball momentum on the finished direction, or a transformation such as
        `momentum(0.9, nesterov=True)`; None for none.
      preconditioned: Callable of (path, leaf): whether it takes this parameter. None means
        `is_hidden_matrix`: matrices that are no embeddings, heads or biases.
      others_rate: Learning rate of the other parameters as a multiple of `learning_rate`; their
        decay in a step, `learning_rate * weight_decay`, is not multiplied. None means as in
        `shampoo`.
      others: Optimizer of the other parameters, learning rate included; None means `optax.nadamw`
        with `others_rate`, the same decay and mask, b1 0.9, b2 0.95 and eps 1e-15.
      placement: Mesh and axes over which blocks, momentum and the state of the other parameters
        are split; None means one device.

    Returns:
      The optimizer; its updates have the dtype of the gradients.

    Raises:
      ValueError: An option out of range, or options that contradict each other.
      TypeError: An option that it does not have; the nearest is named.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.one_sided_shampoo(1e-3, side="right", weight_decay=0.1)
    """
    return _complete(scale_by_one_sided_shampoo, locals(), _others_rate(graft))
