"""Shampoo's directions: the whole walk from gradients to grafted, preconditioned updates."""

from typing import Any, Literal

import optax

from shampoo_jax.base.hyperparameters import check_static
from shampoo_jax.base.options import check_options
from shampoo_jax.blocks.dimension_numbers import DimensionOption
from shampoo_jax.blocks.exponents import (
    SIDES,
    ExponentOption,
    Side,
    given_exponents,
    resolve_exponents,
)
from shampoo_jax.directions.walk import blocked_walk
from shampoo_jax.parts.factors import accumulate_factors
from shampoo_jax.parts.filtering import filter_gradient
from shampoo_jax.parts.kl_factors import accumulate_kl_factors
from shampoo_jax.parts.roots import invert_roots, precondition
from shampoo_jax.solvers.registry import make_solver
from shampoo_jax.solvers.solver import Solver
from shampoo_jax.stacks.placement import Placement


def scale_by_shampoo(
    b1: Any = 0.9,
    b2: Any = 0.9,
    *,
    b3: Any = None,
    bias_correction: bool = True,
    block_size: int | None = 1024,
    merge: int | None = 2,
    canonical: bool = True,
    dimension_numbers: DimensionOption = "flax",
    exponents: ExponentOption = None,
    weighted: bool = True,
    statistics: Literal["gradients", "kl"] = "gradients",
    solver: str | Solver = "eigh",
    cutoff: str = "relative",
    rtol: Any = None,
    atol: Any = 0.0,
    eps: Any = None,
    every: Any = 1,
    start: Any = None,
    stagger: bool = False,
    chunk: int | None = None,
    mu_dtype: Any = None,
    root_dtype: Any = None,
    graft: str | optax.GradientTransformation | None = "adam",
    graft_b2: Any = None,
    graft_eps: Any = 1e-15,
    nonfinite: str = "propagate",
    monitor: int | None = None,
    placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by Shampoo: Kronecker-factored preconditioning, Adam's magnitude per block.

    For a matrix block `G` with `M` its moving average (b1), `L = EMA_b2(G G^T)` and
    `R = EMA_b2(G^T G)`, all bias-corrected, the update is

      `U = L^(-1/4) M R^(-1/4)`, scaled to `|U|_F = |M / (sqrt(EMA(G^2)) + graft_eps)|_F`.

    Inverse roots are *truncated*: eigenvalues below `d * eps_float32 * largest` map to 0, since the
    factors are rank deficient and their noise eigenvalues would otherwise be amplified most.
    Multiplying every gradient by a constant changes nothing beyond rounding, but for `atol`, `eps`,
    `graft_eps` where they matter, `statistics="kl"`, and polynomial solvers, whose error of about a
    percent varies with the scale.

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
      dimension_numbers: `"flax"` reads attention and convolution kernels as matrices, see
        `default_dimension_numbers`; None merges everywhere; or a callable of (path, leaf) returning
        `DimensionNumbers` or None.
      exponents: `e` of `S^(-e)`: None for `1 / (2 * order)`, a number for every dimension, or a
        mapping from block order to a number or to a mapping from dimension to number. Exponent 0
        leaves a dimension alone. `"left"`, `"right"` and `"smaller"` are one-sided Shampoo, see
        `scale_by_one_sided_shampoo`.
      weighted: Whether new statistics have weight `1 - b2`; False adds them with weight 1.
      statistics: `"gradients"`, or `"kl"` for factors of the gradient preconditioned by the other
        dimensions' roots, see `accumulate_kl_factors`: KL-Shampoo with full factors, as Meta's
        package has it; with `exponents=0.5` the paper's iteration. It depends on the scale of the
        gradients. With a truncating solver, directions that no side has seen by the first refresh
        are never learned: use `solver="shifted_eigh"`, or `kl_shampoo(rtol=None)`, where supports
        may grow.
      solver: Name of an inverse-root solver or a `Solver`: `"eigh"`; `"polynomial"`, the same
        truncated root by matrix products, and the cheaper `"polynomial_clip"`; `"auto"`, the faster
        one of eigh and polynomial for backend and size, see `Auto`; `"shifted_eigh"`,
        `"coupled_newton"`, `"higher_order_newton"`; or one of `register_solver`.
      cutoff: `"relative"`, or `"positive"` for the literal rule of result 35.
      rtol: Cutoff relative to a factor's largest eigenvalue; None means `d * eps`.
      atol: Absolute cutoff.
      eps: Damping, for the solvers that have one; None means the solver's default.
      every: Steps between refreshes of the roots.
      start: First step that preconditions; until then the update is the graft's alone. None means
        `every`.
      stagger: Whether each step refreshes one block in `every`, so that all steps cost the same,
        see `invert_roots`.
      chunk: Most roots of one block shape computed at the same time, to bound working memory.
      mu_dtype: Of the stored first moment; `jnp.bfloat16` halves it.
      root_dtype: Of the stored roots; `jnp.bfloat16` halves them. Factors stay in float32.
      graft: `"adam"`, `"rmsprop"`, `"adagrad"`, `"sgd"`, None, a part such as
        `scale_by_second_moment`, or a stock Optax transformation, which then sees raw gradients.
      graft_b2: Decay of the grafted second moment; None means `b2`, or 0.999 where `b2` is 1.
      graft_eps: eps of the graft.
      nonfinite: `"skip_blocks"` gives blocks with a non-finite gradient a zero update and an
        unchanged state; `"propagate"` leaves that to a wrapper around the whole optimizer, such as
        the one inside `shampoo`.
      monitor: Steps between records of the factors' spectra, see `read_monitor`; None for none.
      placement: Mesh and axes over which blocks, their state and all arithmetic on them are split.

    Returns:
      A transformation without learning rate and weight decay. Its state holds stacks of blocks,
      float32 where no other dtype is asked for: first moment, factors, roots and graft moment.

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
    options = locals()
    check_static(options)
    check_options(options)
    if statistics not in ("gradients", "kl"):
        raise ValueError(f"statistics={statistics!r}: use 'gradients' or 'kl'.")
    resolved = resolve_exponents(exponents)
    chosen = make_solver(solver, cutoff=cutoff, rtol=rtol, atol=atol, eps=eps)
    for exponent in given_exponents(exponents):
        chosen.check(exponent)
    roots = invert_roots(
        chosen,
        exponents=resolved,
        every=every,
        start=start,
        stagger=stagger,
        chunk=chunk,
        root_dtype=root_dtype,
    )
    form: Any = dict(exponents=resolved, bias_correction=bias_correction, weighted=weighted)
    if statistics == "kl":
        parts = [accumulate_kl_factors(roots, b2, **form)]
    else:
        parts = [accumulate_factors(b2, **form), roots]
    return blocked_walk(
        options,
        optax.chain(*parts, precondition()),
        first_moment=filter_gradient(b1, b3, bias_correction=bias_correction, mu_dtype=mu_dtype),
        exponents=resolved,
    )


def scale_by_one_sided_shampoo(
    b1: Any = 0.9,
    b2: Any = 0.95,
    *,
    side: Side = "right",
    bias_correction: bool = True,
    block_size: int | None = 1024,
    merge: int | None = 2,
    dimension_numbers: DimensionOption = "flax",
    solver: str | Solver = "eigh",
    cutoff: str = "relative",
    rtol: Any = None,
    atol: Any = 0.0,
    eps: Any = None,
    every: Any = 1,
    start: Any = None,
    stagger: bool = False,
    chunk: int | None = None,
    mu_dtype: Any = None,
    root_dtype: Any = None,
    graft: str | optax.GradientTransformation | None = None,
    graft_b2: Any = None,
    graft_eps: Any = 1e-15,
    nonfinite: str = "propagate",
    monitor: int | None = None,
    placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by one-sided Shampoo: `U = M R^(-1/2)` with `R = EMA(G^T G)`.

    Sources: An et al. 2025 (ASGO, arXiv:2503.20762), Xie et al. 2025 (arXiv:2503.10537). The root
    is truncated where the paper adds eps to it; the paper has neither grafting nor bias correction.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the factor.
      side: `"right"` preconditions the last dimension of a matrix, or of a block of whatever order,
        `"left"` the first, `"smaller"` the smallest of each block, the last one of a square: the
        cheapest. With `"smaller"` the other dimensions, without factors, are not cut.
      bias_correction: As in `scale_by_shampoo`, like all options below.
      block_size: See `scale_by_shampoo`.
      merge: See `scale_by_shampoo`.
      dimension_numbers: See `scale_by_shampoo`.
      solver: See `scale_by_shampoo`.
      cutoff: See `scale_by_shampoo`.
      rtol: See `scale_by_shampoo`.
      atol: See `scale_by_shampoo`.
      eps: See `scale_by_shampoo`.
      every: See `scale_by_shampoo`.
      start: See `scale_by_shampoo`.
      stagger: See `scale_by_shampoo`.
      chunk: See `scale_by_shampoo`.
      mu_dtype: See `scale_by_shampoo`.
      root_dtype: See `scale_by_shampoo`.
      graft: See `scale_by_shampoo`.
      graft_b2: See `scale_by_shampoo`.
      graft_eps: See `scale_by_shampoo`.
      nonfinite: See `scale_by_shampoo`.
      monitor: See `scale_by_shampoo`.
      placement: See `scale_by_shampoo`.

    Returns:
      A transformation without learning rate and weight decay.

    Raises:
      ValueError: An unknown side, or an option out of range.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> tx = shampoo_jax.scale_by_one_sided_shampoo(side="left")
      >>> params = {"w": jnp.ones((2, 3))}
      >>> updates, state = tx.update({"w": 5 * jnp.eye(2, 3)}, tx.init(params))
      >>> updates["w"].round(2).tolist()  # (G G^T)^(-1/2) G
      [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    options = locals()
    check_static(options)
    if options.pop("side") not in SIDES:
        raise ValueError(f"side={side!r}: use one of {sorted(SIDES)}.")
    return scale_by_shampoo(**options, exponents=side)
