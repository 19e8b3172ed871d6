"""Directions made in an eigenbasis of the factors: SOAP, KL-Shampoo and KL-SOAP."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import optax

from shampoo_jax.base.hyperparameters import check_static
from shampoo_jax.base.options import check_options
from shampoo_jax.blocks.dimension_numbers import DimensionOption
from shampoo_jax.blocks.exponents import ExponentOption, resolve_exponents
from shampoo_jax.directions.walk import blocked_walk
from shampoo_jax.parts.eigenbasis import eigenbasis
from shampoo_jax.parts.factors import accumulate_factors, damp
from shampoo_jax.parts.filtering import filter_gradient
from shampoo_jax.parts.grafting import scale_by_second_moment
from shampoo_jax.parts.kl_eigenbasis import kl_eigenbasis
from shampoo_jax.solvers.bases import Basis, make_basis, reorders
from shampoo_jax.stacks.placement import Placement


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
    stagger: bool = False,
    mu_dtype: Any = None,
    start: Any = None,
    refresh: Literal["before", "after"] = "after",
    skip_first: bool = True,
    reorder: bool | None = None,
    rtol: float | None = 0.0,
    graft: str | optax.GradientTransformation | None = None,
    graft_b2: Any = None,
    graft_eps: Any = 1e-15,
    nonfinite: str = "propagate",
    monitor: int | None = None,
    placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by SOAP: Adam in the eigenbasis of Shampoo's factors.

    With `Q` the eigenbases of `L = EMA(G G^T)` and `R = EMA(G^T G)`, `P = Ql^T G Qr` and `M` the
    first moment: `U = Ql [ (Ql^T M Qr) / (sqrt(EMA_b2(P^2)) + eps) ] Qr^T`.

    The defaults are the authors' algorithm (Vyas et al. 2024, arXiv:2409.11321): the first gradient
    only fills factors and bases, each gradient is used before it enters them, columns and second
    moments are sorted by eigenvalue at each refresh. Meta's form (`EigenvalueCorrectedShampoo`) is
    `refresh="before", skip_first=False, reorder=False` with `basis=QRBasis()` or `EighBasis()`.

    Weight decay in `soap` acts as AdamW's, on the parameters before the step; the authors' code
    shrinks them after it, which differs by `lr^2 * weight_decay * U`.

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
      stagger: Whether each step refreshes one block in `every`, so that all steps cost the same.
      mu_dtype: Of the stored first moment; `jnp.bfloat16` halves it.
      start: First refresh; needs `refresh="before"`.
      refresh: Whether bases are refreshed before or after their use, see `eigenbasis`.
      skip_first: Whether the first step makes no update; needs `refresh="after"`.
      reorder: Whether second moments follow when columns are sorted; None: where the basis is the
        authors'. Other bases do not tell the order.
      rtol: Truncation of null directions, see `eigenbasis`.
      graft: As in `scale_by_shampoo`.
      graft_b2: As in `scale_by_shampoo`.
      graft_eps: As in `scale_by_shampoo`.
      nonfinite: As in `scale_by_shampoo`.
      monitor: As in `scale_by_shampoo`.
      placement: As in `scale_by_shampoo`.

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
    options = locals()
    check_static(options)
    check_options(options)
    resolved = resolve_exponents(exponents)
    weighting: Any = {"bias_correction": bias_correction, "weighted": weighted}
    first_moment = filter_gradient(b1, b3, bias_correction=bias_correction, mu_dtype=mu_dtype)
    second = scale_by_second_moment(b2, eps, exponent=exponent, **weighting)
    method = make_basis(basis)
    direction = optax.chain(
        accumulate_factors(b2 if factor_b2 is None else factor_b2, exponents=resolved, **weighting),
        damp(factor_eps),
        eigenbasis(
            # A first moment inside is skipped with the rest; outside it can serve a graft.
            optax.chain(first_moment, second) if skip_first else second,
            basis=method,
            exponents=resolved,
            every=every,
            start=start,
            stagger=stagger,
            refresh=refresh,
            skip_first=skip_first,
            rtol=rtol,
            reorder=reorders(method) if reorder is None else reorder,
        ),
    )
    outside = None if skip_first else first_moment
    return blocked_walk(options, direction, first_moment=outside, exponents=resolved)


def scale_by_kl_shampoo(
    b1: Any = 0.9,
    b2: Any = 0.98,
    *,
    eps: Any = 1e-8,
    first_weight: Any = None,
    normalize: bool = True,
    bias_correction: bool = False,
    block_size: int | None = None,
    merge: int | None = 2,
    canonical: bool = True,
    dimension_numbers: DimensionOption = "flax",
    exponents: ExponentOption = None,
    basis: str | Basis | None = None,
    every: Any = 10,
    stagger: bool = False,
    mu_dtype: Any = None,
    refresh: Literal["before", "after"] = "after",
    skip_first: bool = True,
    cap: str | float = "size",
    rtol: float | None = 0.0,
    nonfinite: str = "propagate",
    monitor: int | None = None,
    placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by KL-Shampoo: factors whitened by each other, eigenvalues tracked apart.

    `U = Ql [ (Ql^T M Qr) * s / (1 + eps s) ] Qr^T`, `s_ij = (dl_i dr_j)^(-1/2)`; see
    `kl_eigenbasis` for factors, bases and eigenvalues d. No grafting.

    The defaults are the authors' algorithm (Lin et al. 2025, arXiv:2509.03378): no bias correction,
    the first gradient only fills the state. Meta's form, roots of full factors, is
    `presets.meta_kl_shampoo`. Weight decay in `kl_shampoo` acts as AdamW's, on the parameters
    before the step, where the authors' code shrinks them after it.

    The result depends on the scale of the gradients: eigenvalues start at 0.1, meant for a mean
    loss. The second step's update is 10 times the first moment, with the default `b1` the gradient
    itself: gradients around 1000, of a loss summed over tokens, move parameters by 1000 learning
    rates in that step. Divide such a loss by the number of tokens.

    Args:
      b1: Decay of the first moment.
      b2: Decay of factors and eigenvalues.
      eps: Damping of s.
      first_weight: See `kl_eigenbasis`.
      normalize: Whether statistics are divided by the other dimensions, see `kl_eigenbasis`.
      bias_correction: Whether moments are divided by the sum of their weights. Eigenvalues have a
        first value, they need none.
      block_size: Largest edge of a block; None for whole matrices.
      merge: See `blocked`.
      canonical: See `scale_by_shampoo`.
      dimension_numbers: See `scale_by_shampoo`.
      exponents: Dimensions with exponent 0 are left alone; other values do not matter.
      basis: `"eigh"`, `"qr"` or None for one unsorted QR step, or a `Basis` that keeps the order
        of columns.
      every: Steps between refreshes of the bases.
      stagger: Whether each step refreshes one block in `every`, so that all steps cost the same.
      mu_dtype: Of the stored first moment; `jnp.bfloat16` halves it.
      refresh: Whether a gradient enters the statistics and bases `"before"` or `"after"` its use.
      skip_first: Whether the first step makes no update, see `kl_eigenbasis`.
      cap: See `kl_eigenbasis`.
      rtol: See `kl_eigenbasis`.
      nonfinite: As in `scale_by_shampoo`.
      monitor: As in `scale_by_shampoo`.
      placement: As in `scale_by_shampoo`.

    Returns:
      A transformation without learning rate and weight decay.

    Raises:
      ValueError: An option out of range, or options that contradict each other.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> tx = shampoo_jax.scale_by_kl_shampoo(every=5)
      >>> params = {"w": jnp.ones((3, 2))}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> float(jnp.abs(updates["w"]).max())  # the first step only fills the state
      0.0
    """
    first_moment = filter_gradient(b1, bias_correction=bias_correction, mu_dtype=mu_dtype)
    return _kl(locals(), first_moment, b2, scaled=True, eps=eps)


def scale_by_kl_soap(
    b1: Any = 0.9,
    b2: Any = 0.98,
    *,
    factor_b2: Any = None,
    eps: Any = 1e-8,
    first_weight: Any = None,
    normalize: bool = True,
    bias_correction: bool = False,
    block_size: int | None = None,
    merge: int | None = 2,
    canonical: bool = True,
    dimension_numbers: DimensionOption = "flax",
    exponents: ExponentOption = None,
    basis: str | Basis | None = None,
    every: Any = 10,
    stagger: bool = False,
    mu_dtype: Any = None,
    refresh: Literal["before", "after"] = "after",
    skip_first: bool = True,
    cap: str | float = "size",
    rtol: float | None = 0.0,
    nonfinite: str = "propagate",
    monitor: int | None = None,
    placement: Placement | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by KL-SOAP: uncorrected Adam in the eigenbasis of KL-Shampoo's factors.

    Source: Lin et al. 2025, arXiv:2509.03378. `first_weight=1.0, cap=4000` with `every=1` is the
    direction of track-3 result 19. Bases depend on the scale of the gradients through the first
    eigenvalues, 0.1, meant for a mean loss; sizes of updates are Adam's and do so
    through `eps` only.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      factor_b2: Decay of factors and eigenvalues; None means `b2`.
      eps: Added to the denominator; on the scale of the gradients.
      first_weight: See `kl_eigenbasis`.
      normalize: See `scale_by_kl_shampoo`.
      bias_correction: See `scale_by_kl_shampoo`.
      block_size: See `scale_by_kl_shampoo`.
      merge: See `blocked`.
      canonical: See `scale_by_shampoo`.
      dimension_numbers: See `scale_by_shampoo`.
      exponents: See `scale_by_kl_shampoo`.
      basis: See `scale_by_kl_shampoo`.
      every: Steps between refreshes of the bases.
      stagger: Whether each step refreshes one block in `every`, so that all steps cost the same.
      mu_dtype: Of the stored first moment; `jnp.bfloat16` halves it.
      refresh: See `scale_by_kl_shampoo`.
      skip_first: See `scale_by_kl_shampoo`.
      cap: See `kl_eigenbasis`.
      rtol: See `kl_eigenbasis`.
      nonfinite: As in `scale_by_shampoo`.
      monitor: As in `scale_by_shampoo`.
      placement: As in `scale_by_shampoo`.

    Returns:
      A transformation without learning rate and weight decay.

    Raises:
      ValueError: An option out of range, or options that contradict each other.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> tx = shampoo_jax.scale_by_kl_soap(every=5)
      >>> params = {"w": jnp.ones((3, 2))}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> float(jnp.abs(updates["w"]).max())  # the first step only fills the state
      0.0
    """
    first_moment = filter_gradient(b1, bias_correction=bias_correction, mu_dtype=mu_dtype)
    second_moment = scale_by_second_moment(b2, eps, bias_correction=bias_correction)
    inner = optax.chain(first_moment, second_moment)
    return _kl(locals(), inner, b2 if factor_b2 is None else factor_b2, scaled=False)


def _kl(
    options: Mapping[str, Any], inner: optax.GradientTransformation, b2: Any, **scaling: Any
) -> optax.GradientTransformationExtraArgs:
    """The walk around `kl_eigenbasis` with the options that both its directions have."""
    check_static(options)
    check_options(options)
    resolved = resolve_exponents(options["exponents"])
    names = "first_weight normalize every stagger refresh skip_first cap rtol".split()
    direction = kl_eigenbasis(
        inner,
        b2,
        exponents=resolved,
        basis=make_basis(options["basis"], keep_order=True),
        **{name: options[name] for name in names},
        **scaling,
    )
    return blocked_walk(options, direction, exponents=resolved)
