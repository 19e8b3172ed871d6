"""Shampoo's direction: the whole walk from gradients to grafted, preconditioned updates."""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import optax

from shampoo_jax.bases import Basis, make_basis
from shampoo_jax.dimension_numbers import DimensionOption
from shampoo_jax.eigenbasis import eigenbasis
from shampoo_jax.exponents import (
    ExponentOption,
    given_exponents,
    resolve_exponents,
)
from shampoo_jax.factors import accumulate_factors, damp
from shampoo_jax.filtering import filter_gradient
from shampoo_jax.grafting import make_magnitude, scale_by_second_moment
from shampoo_jax.hyperparameters import check_static
from shampoo_jax.kl import kl_eigenbasis
from shampoo_jax.options import check_options
from shampoo_jax.registry import make_solver
from shampoo_jax.roots import invert_roots, precondition
from shampoo_jax.solvers import Solver
from shampoo_jax.walk import blocked_walk


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
    solver: str | Solver = "eigh",
    cutoff: str = "relative",
    rtol: Any = None,
    atol: Any = 0.0,
    eps: Any = None,
    every: Any = 1,
    start: Any = None,
    graft: str | optax.GradientTransformation | None = "adam",
    graft_b2: Any = None,
    graft_eps: Any = 1e-15,
    nonfinite: str = "propagate",
    monitor: int | None = None,
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
      dimension_numbers: `"flax"` reads attention and convolution kernels as matrices, see
        `default_dimension_numbers`; None merges everywhere; or a callable of (path, leaf) returning
        `DimensionNumbers` or None.
      exponents: `e` of `S^(-e)`: None for `1 / (2 * order)`, a number for every dimension, or a
        mapping from block order to a number or to a mapping from dimension to number. Exponent 0
        leaves a dimension alone: `{2: {0: 0.5, 1: 0.0}}` is one-sided Shampoo.
      weighted: Whether new statistics have weight `1 - b2`; False adds them with weight 1.
      solver: Name of an inverse-root solver or a `Solver`.
      cutoff: `"relative"`, or `"positive"` for the literal rule of result 35.
      rtol: Cutoff relative to a factor's largest eigenvalue; None means `d * eps`.
      atol: Absolute cutoff.
      eps: Damping, for the solvers that have one; None means the solver's default.
      every: Steps between refreshes of the roots.
      start: First step that preconditions; until then the update is the graft's alone. None means
        `every`.
      graft: `"adam"`, `"rmsprop"`, `"adagrad"`, `"sgd"`, None, a part such as
        `scale_by_second_moment`, or a stock Optax transformation, which then sees raw gradients.
      graft_b2: Decay of the grafted second moment; None means `b2`, or 0.999 where `b2` is 1.
      graft_eps: eps of the graft.
      nonfinite: `"skip_blocks"` gives blocks with a non-finite gradient a zero update and an
        unchanged state; `"propagate"` leaves that to a wrapper around the whole optimizer, such as
        the one inside `shampoo`.
      monitor: Steps between records of the factors' spectra, see `read_monitor`; None for none.

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
    check_static(locals())
    check_options(locals())
    resolved = resolve_exponents(exponents)
    chosen = make_solver(solver, cutoff=cutoff, rtol=rtol, atol=atol, eps=eps)
    for exponent in given_exponents(exponents):
        chosen.check(exponent)
    direction = optax.chain(
        accumulate_factors(
            b2, exponents=resolved, bias_correction=bias_correction, weighted=weighted
        ),
        invert_roots(
            chosen,
            exponents=resolved,
            every=every,
            start=start,
        ),
        precondition(),
    )
    return blocked_walk(
        filter_gradient(b1, b3, bias_correction=bias_correction),
        direction,
        magnitude=make_magnitude(graft, _graft_decay(graft_b2, b2), graft_eps),
        exponents=resolved,
        nonfinite=nonfinite,
        monitor=monitor,
        block_size=block_size,
        merge=merge,
        canonical=canonical,
        dimension_numbers=dimension_numbers,
    )


def _graft_decay(graft_b2: Any, b2: Any) -> Any:
    """`graft_b2`, or where it is None `b2`, but 0.999 where `b2` sums."""
    if graft_b2 is not None:
        return graft_b2
    if isinstance(b2, (int, float)):
        return 0.999 if b2 == 1 else b2
    return jnp.where(b2 == 1, 0.999, b2)


def scale_by_soap(
    b1: Any = 0.95,
    b2: Any = 0.95,
    *,
    factor_b2: Any = None,
    b3: Any = None,
    eps: Any = 1e-8,
    factor_eps: Any = 0.0,
    exponent: float | Callable[[int], float] = 0.5,
    bias_correction: bool = True,
    weighted: bool = True,
    block_size: int | None = None,
    merge: int | None = 2,
    canonical: bool = True,
    dimension_numbers: DimensionOption = "flax",
    exponents: ExponentOption = None,
    basis: str | Basis | None = None,
    every: Any = 10,
    start: Any = None,
    refresh: Literal["before", "after"] = "after",
    skip_first: bool = True,
    reorder: bool = True,
    rtol: float | None = 0.0,
    graft: str | optax.GradientTransformation | None = None,
    graft_b2: Any = None,
    graft_eps: Any = 1e-15,
    nonfinite: str = "propagate",
    monitor: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by SOAP: Adam in the eigenbasis of Shampoo's factors.

    With `Q` the eigenbases of `L = EMA(G G^T)` and `R = EMA(G^T G)`, `P = Ql^T G Qr` and `M` the
    first moment: `U = Ql [ (Ql^T M Qr) / (sqrt(EMA_b2(P^2)) + eps) ] Qr^T`.

    The defaults are the authors' algorithm (Vyas et al. 2024, arXiv:2409.11321): the first gradient
    only fills factors and bases, each gradient is used before it enters them, columns and second
    moments are sorted by eigenvalue at each refresh. Meta's form (`EigenvalueCorrectedShampoo`) is
    `refresh="before", skip_first=False, reorder=False` with `basis=QRBasis()` or `EighBasis()`.

    The authors' code leaves a dimension of more than 10,000 unrotated (`max_precond_dim`); here
    every dimension of every block gets a factor, d x d. `soap` leaves embeddings and heads to
    AdamW; for other long dimensions set `block_size`, or exclude a side of all matrices by
    `exponents={2: {0: 0.0}}`. `explain` names the largest factor.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      factor_b2: Decay of the factors; None means `b2`.
      b3: Decay of the emitted first moment, see `filter_gradient`; None means `b1`.
      eps: Added to the denominator; on the scale of the gradients.
      factor_eps: Added to the diagonal of the factors before their basis is computed; absolute.
      exponent: Exponent of the second moment, or a function of the block order giving it.
      bias_correction: Whether moments are divided by the sum of their weights.
      weighted: Whether new statistics have weight `1 - b2`; False adds them with weight 1.
      block_size: Largest edge of a block; None, as the authors, for whole matrices.
      merge: See `blocked`.
      canonical: See `scale_by_shampoo`.
      dimension_numbers: See `scale_by_shampoo`.
      exponents: Dimensions with exponent 0 keep their basis, as in `scale_by_shampoo`; other values
        do not matter.
      basis: `"eigh"`, `"qr"`, a `Basis`, or None for the authors' sorted QR step.
      every: Steps between refreshes of the bases.
      start: First refresh; needs `refresh="before"`.
      refresh: Whether bases are refreshed before or after their use, see `eigenbasis`.
      skip_first: Whether the first step makes no update; needs `refresh="after"`.
      reorder: Whether second moments follow when columns are sorted.
      rtol: Truncation of null directions, see `eigenbasis`.
      graft: As in `scale_by_shampoo`.
      graft_b2: As in `scale_by_shampoo`.
      graft_eps: As in `scale_by_shampoo`.
      nonfinite: As in `scale_by_shampoo`.
      monitor: As in `scale_by_shampoo`.

    Returns:
      A transformation without learning rate and weight decay.

    Raises:
      ValueError: An option out of range, or options that contradict each other.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> tx = optax.chain(shampoo_jax.scale_by_soap(every=5), optax.scale_by_learning_rate(3e-3))
      >>> params = {"w": jnp.ones((3, 2))}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> float(jnp.abs(updates["w"]).max())  # the first step only fills the state
      0.0
    """
    check_static(locals())
    check_options(locals())
    resolved = resolve_exponents(exponents)
    schedule = {"every": every, "start": start, "refresh": refresh, "skip_first": skip_first}
    weighting = {"bias_correction": bias_correction, "weighted": weighted}
    first_moment = filter_gradient(b1, b3, bias_correction=bias_correction)
    second = scale_by_second_moment(b2, eps, exponent=exponent, **weighting)
    direction = optax.chain(
        accumulate_factors(b2 if factor_b2 is None else factor_b2, exponents=resolved, **weighting),
        damp(factor_eps),
        eigenbasis(
            # A first moment inside is skipped with the rest; outside it can serve a graft.
            optax.chain(first_moment, second) if skip_first else second,
            basis=make_basis(basis),
            exponents=resolved,
            rtol=rtol,
            reorder=reorder,
            **schedule,
        ),
    )
    return blocked_walk(
        None if skip_first else first_moment,
        direction,
        magnitude=make_magnitude(graft, _graft_decay(graft_b2, b2), graft_eps),
        exponents=resolved,
        nonfinite=nonfinite,
        monitor=monitor,
        block_size=block_size,
        merge=merge,
        canonical=canonical,
        dimension_numbers=dimension_numbers,
    )


def scale_by_kl_shampoo(
    b1: Any = 0.9,
    b2: Any = 0.98,
    *,
    eps: Any = 1e-8,
    first_weight: Any = None,
    block_size: int | None = None,
    merge: int | None = 2,
    canonical: bool = True,
    dimension_numbers: DimensionOption = "flax",
    exponents: ExponentOption = None,
    basis: str | Basis | None = None,
    every: Any = 10,
    cap: str | float = "size",
    rtol: float | None = 0.0,
    nonfinite: str = "propagate",
    monitor: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by KL-Shampoo: factors whitened by each other, eigenvalues tracked apart.

    `U = Ql [ (Ql^T M Qr) * s / (1 + eps s) ] Qr^T`, `s_ij = (dl_i dr_j)^(-1/2)`; see
    `kl_eigenbasis` for factors, bases and eigenvalues d. No grafting and no bias correction; the
    first gradient only fills the state. Source: Lin et al. 2025, arXiv:2509.03378. Meta's form,
    roots of full factors, is `accumulate_kl_factors`.

    Args:
      b1: Decay of the first moment.
      b2: Decay of factors and eigenvalues.
      eps: Damping of s.
      first_weight: See `kl_eigenbasis`.
      block_size: Largest edge of a block; None for whole matrices.
      merge: See `blocked`.
      canonical: See `scale_by_shampoo`.
      dimension_numbers: See `scale_by_shampoo`.
      exponents: Dimensions with exponent 0 are left alone; other values do not matter.
      basis: `"eigh"`, `"qr"`, a `Basis`, or None for one unsorted QR step.
      every: Steps between refreshes of the bases.
      cap: See `kl_eigenbasis`.
      rtol: See `kl_eigenbasis`.
      nonfinite: As in `scale_by_shampoo`.
      monitor: As in `scale_by_shampoo`.

    Returns:
      A transformation without learning rate and weight decay.
    """
    check_static(locals())
    check_options(locals())
    resolved = resolve_exponents(exponents)
    part = kl_eigenbasis(
        filter_gradient(b1, bias_correction=False),
        b2,
        scaled=True,
        eps=eps,
        first_weight=first_weight,
        exponents=resolved,
        basis=None if basis is None else make_basis(basis),
        every=every,
        cap=cap,
        rtol=rtol,
    )
    return blocked_walk(
        None,
        part,
        magnitude=None,
        exponents=resolved,
        nonfinite=nonfinite,
        monitor=monitor,
        block_size=block_size,
        merge=merge,
        canonical=canonical,
        dimension_numbers=dimension_numbers,
    )


def scale_by_kl_soap(
    b1: Any = 0.9,
    b2: Any = 0.98,
    *,
    factor_b2: Any = None,
    eps: Any = 1e-8,
    first_weight: Any = None,
    block_size: int | None = None,
    merge: int | None = 2,
    canonical: bool = True,
    dimension_numbers: DimensionOption = "flax",
    exponents: ExponentOption = None,
    basis: str | Basis | None = None,
    every: Any = 10,
    cap: str | float = "size",
    rtol: float | None = 0.0,
    nonfinite: str = "propagate",
    monitor: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by KL-SOAP: uncorrected Adam in the eigenbasis of KL-Shampoo's factors.

    Source: Lin et al. 2025, arXiv:2509.03378. `first_weight=1.0, cap=4000` with `every=1` is the
    direction of track-3 result 19.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      factor_b2: Decay of factors and eigenvalues; None means `b2`.
      eps: Added to the denominator; on the scale of the gradients.
      first_weight: See `kl_eigenbasis`.
      block_size: See `scale_by_kl_shampoo`.
      merge: See `blocked`.
      canonical: See `scale_by_shampoo`.
      dimension_numbers: See `scale_by_shampoo`.
      exponents: See `scale_by_kl_shampoo`.
      basis: See `scale_by_kl_shampoo`.
      every: Steps between refreshes of the bases.
      cap: See `kl_eigenbasis`.
      rtol: See `kl_eigenbasis`.
      nonfinite: As in `scale_by_shampoo`.
      monitor: As in `scale_by_shampoo`.

    Returns:
      A transformation without learning rate and weight decay.
    """
    check_static(locals())
    check_options(locals())
    resolved = resolve_exponents(exponents)
    part = kl_eigenbasis(
        optax.chain(
            filter_gradient(b1, bias_correction=False),
            scale_by_second_moment(b2, eps, bias_correction=False),
        ),
        b2 if factor_b2 is None else factor_b2,
        scaled=False,
        first_weight=first_weight,
        exponents=resolved,
        basis=None if basis is None else make_basis(basis),
        every=every,
        cap=cap,
        rtol=rtol,
    )
    return blocked_walk(
        None,
        part,
        magnitude=None,
        exponents=resolved,
        nonfinite=nonfinite,
        monitor=monitor,
        block_size=block_size,
        merge=merge,
        canonical=canonical,
        dimension_numbers=dimension_numbers,
    )


def scale_by_one_sided_shampoo(
    b1: Any = 0.9,
    b2: Any = 0.95,
    *,
    side: Literal["left", "right"] = "right",
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
    graft: str | optax.GradientTransformation | None = None,
    graft_b2: Any = None,
    graft_eps: Any = 1e-15,
    nonfinite: str = "propagate",
    monitor: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by one-sided Shampoo: `U = M R^(-1/2)` with `R = EMA(G^T G)`.

    Sources: An et al. 2025 (ASGO, arXiv:2503.20762), Xie et al. 2025 (arXiv:2503.10537). The root
    is truncated where the paper adds eps to it; the paper has neither grafting nor bias correction.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the factor.
      side: `"right"` preconditions the last dimension of a matrix, `"left"` the first.
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
      graft: See `scale_by_shampoo`.
      graft_b2: See `scale_by_shampoo`.
      graft_eps: See `scale_by_shampoo`.
      nonfinite: See `scale_by_shampoo`.
      monitor: See `scale_by_shampoo`.

    Returns:
      A transformation without learning rate and weight decay.

    Raises:
      ValueError: An unknown side, or an option out of range.
    """
    check_static(locals())
    check_options(locals())
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r}: use 'left' or 'right'.")
    return scale_by_shampoo(
        b1,
        b2,
        bias_correction=bias_correction,
        block_size=block_size,
        merge=merge,
        dimension_numbers=dimension_numbers,
        exponents={2: {0: 0.5, 1: 0.0} if side == "left" else {0: 0.0, 1: 0.5}},
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
        nonfinite=nonfinite,
        monitor=monitor,
    )
