"""Shampoo's direction: the whole walk from gradients to grafted, preconditioned updates."""

from collections.abc import Mapping
from typing import Any

import optax

from shampoo_jax.blocking import blocked
from shampoo_jax.factors import Exponents, accumulate_factors, default_exponents
from shampoo_jax.filtering import filter_gradient
from shampoo_jax.grafting import graft as graft_parts
from shampoo_jax.grafting import make_magnitude
from shampoo_jax.plan import DimensionRule
from shampoo_jax.roots import invert_roots, precondition
from shampoo_jax.skipping import skip_nonfinite_blocks
from shampoo_jax.solvers import Solver, make_solver

ExponentOption = Mapping[int, float | Mapping[int, float]] | float | None


def scale_by_shampoo(
    b1: Any = 0.9,
    b2: Any = 0.9,
    *,
    b3: Any = None,
    bias_correction: bool = True,
    block_size: int | None = 1024,
    merge: int | None = 2,
    canonical: bool = True,
    dimension_numbers: DimensionRule | None = None,
    exponents: ExponentOption = None,
    weighted: bool = True,
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
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by Shampoo: Kronecker-factored preconditioning, Adam's magnitude per block.

    For a matrix block `G` with `M` its moving average (b1), `L = EMA_b2(G G^T)` and
    `R = EMA_b2(G^T G)`, all bias-corrected, the update is

      `U = L^(-1/4) M R^(-1/4)`, scaled to `|U|_F = |M / (sqrt(EMA(G^2)) + graft_eps)|_F`.

    Inverse roots are *truncated*: eigenvalues below `d * eps_float32 * largest` map to 0, since the
    factors are rank deficient and their noise eigenvalues would otherwise be amplified most.
    Multiplying every gradient by a constant changes nothing beyond rounding.

    Sources: Gupta et al. 2018 (arXiv:1802.09568); Shi et al. 2023 (arXiv:2309.06497) for grafting
    and blocking; track-3 result 35 of modded-nanogpt for the truncation.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the factors, in [0, 1]; 1 sums them.
      b3: Decay of the emitted first moment, see `filter_gradient`; None means `b1`.
      bias_correction: Whether first moment and factors are divided by the sum of their weights.
      block_size: Largest edge of a block; None for whole parameters.
      merge: Smallest order that neighbouring dimensions are merged to, see `blocked`.
      canonical: Whether matrix blocks with equal exponents are stored longer dimension first. False
        keeps the order of every product as in the parameter, which matters only for parity of
        rounding noise under `cutoff="positive"`.
      dimension_numbers: Callable of (path, leaf) returning `DimensionNumbers` or None.
      exponents: `e` of `S^(-e)`: None for `1 / (2 * order)`, a number for every dimension, or a
        mapping from block order to a number or to a mapping from dimension to number. Exponent 0
        leaves a dimension alone: `{2: {0: 0.5, 1: 0.0}}` is one-sided Shampoo.
      weighted: Whether new statistics have weight `1 - b2`; False adds them with weight 1.
      solver: Name of an inverse-root solver or a `Solver`.
      cutoff: `"relative"`, or `"positive"` for the literal rule of result 35.
      rtol: Cutoff relative to a factor's largest eigenvalue; None means `d * eps`.
      atol: Absolute cutoff.
      eps: Damping, for the solvers that have one.
      every: Steps between refreshes of the roots.
      start: First step that preconditions; until then the update is the graft's alone. None means
        `every`.
      graft: `"adam"`, `"rmsprop"`, `"adagrad"`, `"sgd"`, None, a part such as `scale_by_diagonal`,
        or a stock Optax transformation, which then sees raw gradients.
      graft_b2: Decay of the grafted second moment; None means `b2`, or 0.999 where `b2` is 1.
      graft_eps: eps of the graft.
      nonfinite: `"skip_blocks"` gives blocks with a non-finite gradient a zero update and an
        unchanged state; `"propagate"` leaves that to a wrapper around the whole optimizer, such as
        the one inside `shampoo`.

    Returns:
      A transformation without learning rate and weight decay. Its state holds float32 stacks of
      blocks: first moment, factors, roots and graft moment.

    Raises:
      ValueError: An option out of range, or options that contradict each other.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> tx = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     shampoo_jax.scale_by_shampoo(b1=0.9, b2=0.95),
      ...     optax.add_decayed_weights(0.1),
      ...     optax.scale_by_learning_rate(0.01),
      ... )
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> grads = {"w": jnp.eye(3, 2), "b": jnp.ones(2)}
      >>> updates, state = tx.update(grads, state, params)
      >>> bool(updates["w"][0, 0] < 0)
      True
    """
    resolved = resolve_exponents(exponents)
    direction = optax.chain(
        accumulate_factors(
            b2, exponents=resolved, bias_correction=bias_correction, weighted=weighted
        ),
        invert_roots(
            make_solver(solver, cutoff=cutoff, rtol=rtol, atol=atol, eps=eps),
            exponents=resolved,
            every=every,
            start=start,
        ),
        precondition(),
    )
    if graft_b2 is None:
        graft_b2 = 0.999 if isinstance(b2, (int, float)) and b2 == 1 else b2
    magnitude = make_magnitude(graft, graft_b2, graft_eps)
    walk = optax.chain(
        filter_gradient(b1, b3, bias_correction=bias_correction),
        direction if magnitude is None else graft_parts(magnitude, direction),
    )
    if nonfinite not in ("propagate", "skip_blocks"):
        raise ValueError(f"nonfinite={nonfinite!r}: use 'propagate' or 'skip_blocks'.")
    return blocked(
        skip_nonfinite_blocks(walk) if nonfinite == "skip_blocks" else walk,
        block_size=block_size,
        merge=merge,
        canonical=canonical and len(set(resolved(2))) == 1,
        dimension_numbers=dimension_numbers,
    )


def resolve_exponents(option: ExponentOption) -> Exponents:
    """The option of `scale_by_shampoo` as a function from block order to exponents.

    Args:
      option: None, a number, or a mapping from order to a number or to {dimension: number}.

    Returns:
      Function of the order giving one exponent a dimension; what the option leaves out is
      `1 / (2 * order)`.

    Raises:
      ValueError: A negative exponent, or a dimension that the order does not have.
    """
    if option is None:
        return default_exponents
    if isinstance(option, (int, float)):
        _check_exponent(option)
        return lambda order: (float(option),) * order

    for order, entry in option.items():
        for dim, value in entry.items() if isinstance(entry, Mapping) else ((0, entry),):
            _check_exponent(value)
            if isinstance(entry, Mapping) and not 0 <= dim < order:
                raise ValueError(
                    f"exponents[{order}] names dimension {dim}: blocks of order {order} have "
                    f"dimensions 0 to {order - 1}."
                )

    def exponents(order: int) -> tuple[float, ...]:
        entry = option.get(order, {})
        if not isinstance(entry, Mapping):
            return (float(entry),) * order
        default = default_exponents(order)
        return tuple(float(entry.get(k, default[k])) for k in range(order))

    return exponents


def _check_exponent(value: float) -> None:
    if value < 0:
        raise ValueError(f"exponent {value} must not be negative: roots are inverse already.")
