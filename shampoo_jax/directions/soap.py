"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from collections.abc import Callable
from typing import Any

import optax
from jax.typing import DTypeLike

from shampoo_jax.base.hyperparameters import checked
from shampoo_jax.base.options import Scalar, Whole, check_dtype, is_off
from shampoo_jax.base.signatures import suggests
from shampoo_jax.blocks.blocking import Blocking
from shampoo_jax.blocks.exponents import ExponentOption
from shampoo_jax.directions.walk import walk
from shampoo_jax.parts.eigenbasis import eigenbasis
from shampoo_jax.parts.factors import accumulate_factors, damp
from shampoo_jax.parts.filtering import filter_gradient
from shampoo_jax.parts.grafting import make_magnitude, scale_by_second_moment
from shampoo_jax.parts.refresh import BasisRefresh, refresh_of_bases
from shampoo_jax.solvers.bases import Basis, make_basis
from shampoo_jax.stacks.guard import Guarded
from shampoo_jax.stacks.placement import Placement

WHOLE = Blocking(size=None)  # the authors' code does not cut matrices


@suggests
def scale_by_soap(
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    *,
    factor_b2: Scalar | None = None,
    b3: Scalar | None = None,
    eps: Scalar = 1e-8,
    damping: Scalar = 0.0,
    exponent: float | Callable[[int], float] = 0.5,
    bias_correction: bool = True,
    weighted: bool = True,
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
    placement: Placement | None = None,
) -> Guarded:
    """Rescales updates by SOAP: Adam in the eigenbasis of Shampoo's factors.

    With `Q` the eigenbases of `L = EMA(G G^T)` and `R = EMA(G^T G)`, `P = Ql^T G Qr` and `M` the
    first moment: `U = Ql [ (Ql^T M Qr) / (sqrt(EMA_b2(P^2)) + eps) ] Qr^T`.

    The defaults are the authors' algorithm (Vyas et al. 2024, arXiv:2409.11321): the first gradient
    only fills factors and bases, each gradient is used before it enters them, columns and second
    moments are sorted by eigenvalue at each refresh. Meta's form (`EigenvalueCorrectedShampoo`) is
    `presets.meta_soap`.

    The authors' code adds eps before the bias correction, `eps_hat=True`: no difference while eps
    is far below the gradients, smaller early steps where it is not.

    Weight decay in `soap` acts as AdamW's, on the parameters before the step; the authors' code
    shrinks them after it, which differs by `lr^2 * weight_decay * U`.

    As in the authors' code a dimension of more than 10,000 is left unrotated; so is the long side
    of a very thin matrix, whose factor would have more than 64 times its entries. `explain` names
    the largest factor.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1]; 1 sums.
      factor_b2: Decay of the factors; None means `b2`.
      b3: Decay of the emitted first moment, see `filter_gradient`; None means `b1`.
      eps: Added to the denominator; on the scale of the gradients.
      damping: Added to the diagonal of the factors before their basis is computed; absolute.
      exponent: Exponent of the second moment, or a function of the number of dimensions of a block
        giving it.
      bias_correction: Whether moments are divided by the sum of their weights.
      weighted: Whether new statistics have weight `1 - b2`; False adds them with weight 1.
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
        update; 0.0 truncates nothing, None means `d * eps` of the dtype. Any but 0.0 leaves no
        basis of a null space to rounding, see `eigenbasis`.
      graft: Magnitude of every block, as in `scale_by_shampoo`; None leaves that of the direction.
      mu_dtype: Of the stored first moment; `jnp.bfloat16` halves it.
      monitor: Steps between records of the factors' spectra, see `read_monitor`; None for none.
      placement: Mesh and axes over which blocks are split; None means one device.

    Returns:
      A transformation without learning rate and weight decay. Its state holds stacks of blocks:
      moments, factors and bases.

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
    options = checked(locals())
    check_dtype("mu_dtype", mu_dtype)  # rotated with the basis, in which a form of its own is not
    when, method = refresh_of_bases(refresh), make_basis(basis)
    weighting: Any = {"bias_correction": bias_correction, "weighted": weighted}
    first_moment = filter_gradient(b1, b3, bias_correction=bias_correction, mu_dtype=mu_dtype)
    second = scale_by_second_moment(b2, eps, exponent=exponent, eps_hat=eps_hat, **weighting)
    # A first moment inside is skipped with the rest; outside it can serve a graft.
    inner = optax.chain(first_moment, second) if when.skip_first else second
    bases = eigenbasis(inner, basis=method, every=every, refresh=when, rtol=rtol)
    decay = b2 if factor_b2 is None else factor_b2
    return walk(
        optax.chain(*_factors(decay, damping, rtol, weighting), bases),
        options,
        scale_by_soap,
        method,
        first_moment=None if when.skip_first else first_moment,
        magnitude=make_magnitude(graft, b2),
    )


def _factors(
    b2: Any, damping: Any, rtol: Any, weighting: dict[str, Any]
) -> list[optax.GradientTransformation]:
    """Factors, damped where asked for; ValueError where truncation is asked for beside it."""
    if is_off(damping):
        # Bases do not depend on the scale of a factor: corrected ones would be copies for nothing.
        uncorrected: Any = {**weighting, "bias_correction": False}
        return [accumulate_factors(b2, **uncorrected)]
    if not is_off(rtol):
        raise ValueError(
            f"damping={damping} with rtol={rtol}: damping lifts the null directions that "
            "truncation is to remove, drop damping or set rtol=0.0."
        )
    return [accumulate_factors(b2, **weighting), damp(damping)]
