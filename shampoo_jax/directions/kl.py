"""KL-Shampoo and KL-SOAP: factors whitened by each other, eigenvalues tracked apart."""

from typing import Any

import optax
from jax.typing import DTypeLike

from shampoo_jax.base.hyperparameters import checked
from shampoo_jax.base.options import Scalar, Whole, check_dtype
from shampoo_jax.base.signatures import suggests
from shampoo_jax.blocks.blocking import Blocking
from shampoo_jax.blocks.exponents import ExponentOption
from shampoo_jax.directions.soap import WHOLE
from shampoo_jax.directions.walk import walk
from shampoo_jax.parts.filtering import filter_gradient
from shampoo_jax.parts.grafting import scale_by_second_moment
from shampoo_jax.parts.kl_eigenbasis import EIGENVALUE_INIT, kl_eigenbasis
from shampoo_jax.parts.refresh import BasisRefresh
from shampoo_jax.solvers.bases import Basis, make_basis
from shampoo_jax.stacks.guard import Guarded
from shampoo_jax.stacks.placement import Placement


@suggests
def scale_by_kl_shampoo(
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
    placement: Placement | None = None,
) -> Guarded:
    """Rescales updates by KL-Shampoo: factors whitened by each other, eigenvalues tracked apart.

    `U = Ql [ (Ql^T M Qr) * s / (1 + eps s) ] Qr^T`, `s_ij = (dl_i dr_j)^(-1/2)`; see
    `kl_eigenbasis` for factors, bases and eigenvalues d. No grafting.

    The defaults are the authors' algorithm (Lin et al. 2025, arXiv:2509.03378) but for `max_scale`:
    no bias correction, the first gradient only fills the state. Meta's form, roots of full factors,
    is `presets.meta_kl_shampoo`. Weight decay in `kl_shampoo` acts as AdamW's, on the parameters
    before the step, where the authors' code shrinks them after it.

    Multiplying every gradient by a constant changes nothing but through eps. With the authors'
    `max_scale="size"` it does: eigenvalues start at 0.1, meant for a mean loss. The second step's
    update is 10 times the first moment, with the default `b1` the gradient itself: gradients around
    1000, of a loss summed over tokens, move parameters by 1000 learning rates in that step; divide
    such a loss by the number of tokens. At the other end eigenvalues are bounded: blocks `m x n`
    whose gradients have a root mean square below `1 / (m n)` (each of them 10 at least, 4000 at
    most) are never preconditioned, their update is a constant times the first moment.

    Args:
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
        update; 0.0 truncates nothing, None means `d * eps` of the dtype. Any but 0.0 leaves no
        basis of a null space to rounding, see `eigenbasis`.
      mu_dtype: Of the stored first moment; `jnp.bfloat16` halves it.
      monitor: Steps between records of the factors' spectra, see `read_monitor`; None for none.
      placement: Mesh and axes over which blocks are split; None means one device.

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
    options = locals()
    first_moment = filter_gradient(b1, bias_correction=bias_correction, mu_dtype=mu_dtype)
    return _kl(options, scale_by_kl_shampoo, first_moment, b2, scaled=True, eps=eps)


@suggests
def scale_by_kl_soap(
    b1: Scalar = 0.9,
    b2: Scalar = 0.98,
    *,
    factor_b2: Scalar | None = None,
    eps: Scalar = 1e-8,
    first_weight: Scalar | None = None,
    normalize: bool = True,
    bias_correction: bool = False,
    eps_hat: bool = False,
    blocking: Blocking | None = WHOLE,
    exponents: ExponentOption = "bounded",
    basis: str | Basis | None = None,
    every: Whole = 10,
    refresh: BasisRefresh | None = None,
    max_scale: str | float = "size",
    first_eigenvalue: Scalar = EIGENVALUE_INIT,
    rtol: float | None = 0.0,
    mu_dtype: DTypeLike | None = None,
    monitor: int | None = None,
    placement: Placement | None = None,
) -> Guarded:
    """Rescales updates by KL-SOAP: uncorrected Adam in the eigenbasis of KL-Shampoo's factors.

    Source: Lin et al. 2025, arXiv:2509.03378. `first_weight=1.0, max_scale=4000` with `every=1` is
    the direction of track-3 result 19. Bases depend on the scale of the gradients through the first
    eigenvalues, 0.1, and their bound, meant for a mean loss, unless `max_scale="relative"`; sizes
    of updates are Adam's and do so through `eps` only.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      factor_b2: Decay of factors and eigenvalues; None means `b2`.
      eps: Added to the denominator; on the scale of the gradients.
      first_weight: Weight of the first gradient in the factors; None means `1 - b2`.
      normalize: Whether statistics are means over the other dimensions, not sums.
      bias_correction: Whether moments are divided by the sum of their weights. Eigenvalues have a
        first value, they need none.
      eps_hat: Whether eps is added before the bias correction, see `scale_by_second_moment`.
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
      first_eigenvalue: First value of all eigenvalues, unless `max_scale="relative"`.
      rtol: Directions whose eigenvalue is at most `rtol` times a factor's largest get a zero
        update; 0.0 truncates nothing, None means `d * eps` of the dtype. Any but 0.0 leaves no
        basis of a null space to rounding, see `eigenbasis`.
      mu_dtype: Of the stored first moment; `jnp.bfloat16` halves it.
      monitor: Steps between records of the factors' spectra, see `read_monitor`; None for none.
      placement: Mesh and axes over which blocks are split; None means one device.

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
    options = locals()
    check_dtype("mu_dtype", mu_dtype)  # rotated with the basis, in which a form of its own is not
    first_moment = filter_gradient(b1, bias_correction=bias_correction, mu_dtype=mu_dtype)
    correction: Any = {"bias_correction": bias_correction, "eps_hat": eps_hat}
    second_moment = scale_by_second_moment(b2, eps, **correction)
    inner = optax.chain(first_moment, second_moment)
    decay = b2 if factor_b2 is None else factor_b2
    return _kl(options, scale_by_kl_soap, inner, decay, scaled=False)


def _kl(
    options: dict[str, Any],
    factory: Any,
    inner: optax.GradientTransformation,
    b2: Any,
    **scaling: Any,
) -> Guarded:
    """The walk around `kl_eigenbasis` with the options that both its directions have."""
    checked(options)
    method = make_basis(options["basis"], keep_order=True)
    names = ("first_weight", "normalize", "every", "refresh", "max_scale", "rtol")
    names += ("first_eigenvalue",) * ("first_eigenvalue" in options)
    shared = {name: options[name] for name in names}
    direction = kl_eigenbasis(inner, b2, basis=method, **shared, **scaling)
    return walk(direction, options, factory, method, whitened=True)
