"""Settings with a source: keyword options for the aliases and `scale_by_*` functions.

Each function returns a dictionary to be unpacked, `shampoo(**presets.track3())`; what is known of
its results stands in its docstring. The `meta_*` presets are directions in the form of Meta's
distributed_shampoo (facebookresearch/optimizers), which the golden tests replay.
"""

from typing import Any

import optax

from shampoo_jax.base.options import check_options
from shampoo_jax.blocks.blocking import Blocking
from shampoo_jax.optimizers.algoperf import ALGOPERF, algoperf
from shampoo_jax.parts.grafting import scale_by_second_moment
from shampoo_jax.parts.refresh import BasisRefresh
from shampoo_jax.solvers.bases import Basis, EighBasis, QRBasis
from shampoo_jax.solvers.carried import CarriedBasis
from shampoo_jax.solvers.eigh import ShiftedEigh, TruncatedEigh

__all__ = [
    "ALGOPERF",
    "adamw_drop_in",
    "algoperf",
    "kl_shampoo",
    "meta_eigendecomposed",
    "meta_eigendecomposed_kl",
    "meta_kl_shampoo",
    "meta_shampoo",
    "meta_soap",
    "record_19",
    "record_27",
    "soap",
    "track3",
    "track3_relative",
]

Options = dict[str, Any]
# The papers' optimizers have one rate, and no look ahead for parameters that are no matrices.
_OTHERS = optax.adamw(3e-3, 0.9, 0.95, 1e-15, weight_decay=0.01)


def adamw_drop_in(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> Options:
    """Options of `shampoo` that keep a tuned AdamW's step sizes.

    Every block moves as far as AdamW with these settings would move it, in Shampoo's direction;
    other parameters keep AdamW itself. The way in that Meta's package recommends (Shi et al. 2023,
    arXiv:2309.06497, section 3.3). No published result with these literals.

    Args:
      learning_rate: AdamW's.
      b1: AdamW's.
      b2: AdamW's; factors use it too.
      eps: AdamW's.
      weight_decay: AdamW's.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.shampoo(**shampoo_jax.presets.adamw_drop_in(3e-4))
    """
    check_options(locals())
    return dict(
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        graft=scale_by_second_moment(b2, eps),
        weight_decay=weight_decay,
        others=optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay),
    )


def track3() -> Options:
    """Options of `shampoo` for the matrices of track-3 result 35, literally.

    Cutoff at zero (rounding noise is kept), unblocked, refreshed every step; eps on the scale of
    gradients summed over 524,288 tokens. Result with the reference implementation: validation loss
    3.27656 and 3.27675 at step 3375 on FineWeb with a 124M GPT-2 (Anil 2026). The learning rate is
    constant for 30 % of the steps, then falls linearly to zero. AdamW on the rest is left to the
    caller: three learning rates there, see `nanogpt.presets`.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.shampoo(**shampoo_jax.presets.track3())
    """
    return dict(
        learning_rate=0.01,
        b1=0.9,
        b2=0.9,
        blocking=Blocking(size=8192, canonical=False),
        exponents=None,
        solver=TruncatedEigh(rtol=0.0),
        every=1,
        graft=scale_by_second_moment(0.9, 1e-15),
        weight_decay=0.1,
    )


def track3_relative() -> Options:
    """`track3` with the relative cutoff `d * eps`: the default of this package.

    The same optimizer but for eigenvalues that are rounding noise. Not run at full size.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.shampoo(**shampoo_jax.presets.track3_relative())
    """
    return {**track3(), "solver": TruncatedEigh(), "blocking": Blocking(size=8192)}


def soap() -> Options:
    """Options of `soap` as in the paper (Vyas et al. 2024, arXiv:2409.11321).

    Reported there at 360M and 660M parameters: over 40 % fewer iterations than AdamW.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.soap(**shampoo_jax.presets.soap())
    """
    whole = Blocking(size=None, merge=None)
    return dict(
        learning_rate=3e-3,
        b1=0.95,
        b2=0.95,
        eps=1e-8,
        every=10,
        weight_decay=0.01,
        blocking=whole,
        others=_OTHERS,
    )


def kl_shampoo() -> Options:
    """Options of `kl_shampoo` as in the paper's code (Lin et al. 2025, arXiv:2509.03378).

    Reported there: better pretraining loss than SOAP and Shampoo at SOAP's run time.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.kl_shampoo(**shampoo_jax.presets.kl_shampoo())
    """
    return dict(
        learning_rate=3e-3,
        b1=0.9,
        b2=0.98,
        eps=1e-8,
        every=10,
        max_scale="size",
        weight_decay=0.01,
        others=_OTHERS,
    )


def record_27() -> Options:
    """Options of `scale_by_soap` for the direction of track-3 result 27 (SOAP-H, 3125 steps).

    Bases from the first gradient, whose step is not skipped, then one unsorted QR step after every
    update; no bias correction. The record also fixes each matrix's norm (hyperball), starts from
    other weights and uses `0.018 * (1 - s/3200)^1.25`. Six runs: mean 3.27818.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.scale_by_soap(**shampoo_jax.presets.record_27())
    """
    return dict(
        b1=0.95,
        b2=0.9,
        eps=1e-8,
        bias_correction=False,
        basis=QRBasis(sort=None),
        every=1,
        refresh=BasisRefresh(skip_first=False),
    )


def record_19() -> Options:
    """Options of `scale_by_kl_soap` for the direction of track-3 result 19 (KL-SOAP-H, 3125 steps).

    The first gradient enters the factors with weight 1; scales are capped at 4000. Hyperball,
    weights and schedule as in `record_27`. Six runs: mean 3.27800.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.scale_by_kl_soap(**shampoo_jax.presets.record_19())
    """
    return dict(
        b1=0.95, b2=0.9, factor_b2=0.9, eps=1e-8, first_weight=1.0, max_scale=4000.0, every=1
    )


def meta_shampoo(damping: float = 1e-12, block_size: int = 1024, every: int = 1) -> Options:
    """Options of `scale_by_shampoo` for Meta's defaults: summed factors, damped, no grafting.

    `merge=1` turns every parameter of up to `block_size` elements into a vector.

    Args:
      damping: Added to the factors' eigenvalues; absolute, on the scale of squared gradients.
      block_size: Largest edge of a block.
      every: Steps between refreshes of the roots.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.scale_by_shampoo(**shampoo_jax.presets.meta_shampoo())
    """
    check_options(locals())
    return dict(
        b1=0.9,
        b2=1.0,
        solver=ShiftedEigh(damping),
        blocking=_meta_blocking(block_size),
        exponents=None,
        every=every,
        graft=None,
    )


def meta_eigendecomposed(
    basis: Basis | None = None, damping: float = 1e-12, block_size: int = 1024, every: int = 1
) -> Options:
    """Options of `scale_by_shampoo` for Meta's `EigendecomposedShampoo`.

    Between refreshes eigendecompositions are kept, not roots. That differs from `meta_shampoo` in
    what steps before the first refresh, `(1 + damping)^(-1/4)` a side, and where `basis` is carried
    from one refresh to the next: `QRBasis()`, or `EighBasis(tolerance)`; None means `EighBasis()`.

    Args:
      basis: How eigenvectors are computed, and carried; None means `EighBasis()`.
      damping: Added to the factors' eigenvalues; absolute, on the scale of squared gradients.
      block_size: Largest edge of a block.
      every: Steps between refreshes of the roots.

    Example:
      >>> import shampoo_jax
      >>> options = shampoo_jax.presets.meta_eigendecomposed(shampoo_jax.QRBasis())
      >>> tx = shampoo_jax.scale_by_shampoo(**options)
    """
    solver = CarriedBasis(EighBasis() if basis is None else basis, damping)
    return {**meta_shampoo(block_size=block_size, every=every), "solver": solver}


def meta_kl_shampoo(damping: float = 1e-12, block_size: int = 1024, every: int = 1) -> Options:
    """Options of `scale_by_shampoo` for Meta's `RootInvKLShampoo`.

    Its exponents are Shampoo's; `exponents={2: 0.5}` on top is the paper's iteration on matrices.

    Args:
      damping: Added to the factors' eigenvalues; absolute, on the scale of squared gradients.
      block_size: Largest edge of a block.
      every: Steps between refreshes of the roots.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.scale_by_shampoo(**shampoo_jax.presets.meta_kl_shampoo(damping=1e-6))
    """
    return {**meta_shampoo(damping, block_size, every), "statistics": "kl"}


def meta_eigendecomposed_kl(
    basis: Basis | None = None, damping: float = 1e-12, block_size: int = 1024, every: int = 1
) -> Options:
    """Options of `scale_by_shampoo` for Meta's `EigendecomposedKLShampoo`.

    `meta_kl_shampoo` in the form of `meta_eigendecomposed`.

    Args:
      basis: How eigenvectors are computed, and carried; None means `EighBasis()`.
      damping: Added to the factors' eigenvalues; absolute, on the scale of squared gradients.
      block_size: Largest edge of a block.
      every: Steps between refreshes of the roots.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.scale_by_shampoo(**shampoo_jax.presets.meta_eigendecomposed_kl())
    """
    return {**meta_eigendecomposed(basis, damping, block_size, every), "statistics": "kl"}


def meta_soap(eps: float = 1e-12, block_size: int = 1024, every: int = 1) -> Options:
    """Options of `scale_by_soap` for Meta's `EigenvalueCorrectedShampoo` with `DefaultSOAPConfig`.

    Bases are refreshed before their use, by one QR step; no step is skipped, no moment reordered.

    Args:
      eps: Added to the denominator, and to the diagonal of the factors before their bases are
        computed.
      block_size: Largest edge of a block.
      every: Steps between refreshes of the bases.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.scale_by_soap(**shampoo_jax.presets.meta_soap())
    """
    check_options(locals())
    return dict(
        b1=0.9,
        b2=1.0,
        eps=eps,
        damping=eps,
        basis="qr",
        every=every,
        refresh=BasisRefresh(when="before", skip_first=False),
        blocking=_meta_blocking(block_size),
    )


def _meta_blocking(size: int) -> Blocking:
    return Blocking(size, merge=1, canonical=False, dimension_numbers=None)
