"""KL-Shampoo and KL-SOAP in their practical form: eigenbases, and eigenvalues tracked apart."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.paths import stack_of
from shampoo_jax.blocks.blocks import Blocks, Part, blocks_part, is_blocks, map_blocks, where_block
from shampoo_jax.blocks.exponents import Exponents, default_exponents, per_factor
from shampoo_jax.parts.change_of_basis import Matrices, along
from shampoo_jax.parts.eigenbasis import eigenbasis
from shampoo_jax.parts.factors import zero_factors
from shampoo_jax.parts.filtering import check_range
from shampoo_jax.parts.kl_factors import whitened_contractions
from shampoo_jax.parts.roots import apply_matrices
from shampoo_jax.solvers.bases import Basis, EighBasis, QRBasis
from shampoo_jax.stacks.guard import where_blocks

Array = jax.Array

# Smallest tracked eigenvalue, and the first value of all (authors' code of arXiv:2509.03378).
EIGENVALUE_FLOOR = 1e-30
EIGENVALUE_INIT = 0.1


class KLEigenbasisState(NamedTuple):
    """State of `kl_eigenbasis`."""

    count: Array  # int32[], steps taken
    factors: Any  # per stack a tuple over dimensions of [N, d, d] or None
    eigenvalues: Any  # per stack a tuple over dimensions of [N, d] or None, tracked on their own
    inner: Any  # `EigenbasisState`; its failures count steps that kept old values as well


def kl_eigenbasis(
    inner: optax.GradientTransformation,
    b2: float | Array = 0.98,
    *,
    scaled: bool,
    eps: float | Array = 1e-8,
    first_weight: float | Array | None = None,
    normalize: bool = True,
    exponents: Exponents = default_exponents,
    basis: Basis | None = None,
    every: int | Array = 10,
    stagger: bool = False,
    refresh: Literal["before", "after"] = "after",
    skip_first: bool = True,
    cap: str | float = "size",
    rtol: float | None = 0.0,
) -> Part:
    """KL-Shampoo and KL-SOAP in their practical form: bases by QR, eigenvalues tracked apart.

    In the eigenbases, with `P = Ql^T G Qr` and `s = d^(-1/2)` of the tracked eigenvalues:

      `L <- b2 L + (1 - b2)/n G Qr diag(1/dr) Qr^T G^T`, `R` likewise,
      `dl <- b2 dl + (1 - b2) mean_j P_ij^2 / dr_j`, `dr` likewise with the old `dl`,
      `Q <- qr(S Q)` every `every` steps, all after the update has been made.

    The first gradient only fills factors and bases; all eigenvalues start at 0.1. Source: Lin et
    al. 2025, arXiv:2509.03378, and its authors' code.

    Where a finite gradient makes something of a block overflow, the block keeps its factors, bases,
    eigenvalues and inner state, its update is zero, and this is counted.

    Args:
      inner: Part that runs in `eigenbasis`, so its decay of parameters and its first moments are
        treated as there.
      b2: Decay of factors and eigenvalues.
      scaled: True multiplies the update by `s / (1 + eps s)`, `s_ij = sl_i sr_j` (KL-Shampoo);
        False leaves the scaling to `inner` (KL-SOAP).
      eps: See `scaled`.
      first_weight: Weight of the first gradient in the factors; None means `1 - b2`.
      normalize: Whether factors and eigenvalues are means over the other dimensions (the `1/n` and
        the mean above); False sums over them.
      exponents: Dimensions with exponent 0 are left alone; the values do not matter.
      basis: How bases are refreshed; None means one unsorted QR step. It may not change the order
        of columns, which is that of the eigenvalues.
      every: Steps between refreshes.
      stagger: See `eigenbasis`.
      refresh: `"after"` uses each gradient before it enters factors, eigenvalues and bases, as
        above; `"before"` lets it enter them first, with identities for bases until step `every`.
      skip_first: Whether the first step makes no update and `inner` does not see it; needs
        `refresh="after"`. False makes that update with eigenvalues 0.1, so that with `scaled` it is
        on the scale of the gradients.
      cap: Largest s: `"size"` means `max(10, min(d, 4000))`, the authors' choice.
      rtol: Truncation of null directions of the factors, see `eigenbasis`.

    Returns:
      A part that stands for statistics, roots and preconditioning together.

    Raises:
      ValueError: `b2` outside [0, 1), a basis that sorts, or what `eigenbasis` refuses.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> lion = shampoo_jax.from_gradients(optax.scale_by_lion())
      >>> tx = shampoo_jax.blocked(shampoo_jax.kl_eigenbasis(lion, scaled=False, skip_first=False))
      >>> updates, state = tx.update({"w": jnp.eye(2)}, tx.init({"w": jnp.eye(2)}))
      >>> updates["w"].shape
      (2, 2)
    """
    check_range("b2", b2)
    basis = QRBasis(sort=None) if basis is None else basis
    _check_order(basis)
    tx = eigenbasis(
        optax.chain(inner, _scale_by_eigenvalues(eps)) if scaled else inner,
        basis=basis,
        exponents=exponents,
        every=every,
        stagger=stagger,
        refresh=refresh,
        skip_first=skip_first,
        rtol=rtol,
    )

    def init(params: Any) -> KLEigenbasisState:
        return KLEigenbasisState(
            jnp.zeros([], jnp.int32),
            map_blocks(lambda p: zero_factors(p, exponents), params),
            map_blocks(lambda p: _first_eigenvalues(p, exponents), params),
            tx.init(params),
        )

    def update(blocks: Any, old: KLEigenbasisState, params: Any) -> tuple[Any, Any]:
        weight = 1 - b2 if first_weight is None else first_weight
        factors, eigenvalues = _statistics(blocks, old, b2, weight, normalize, cap)
        used = eigenvalues if refresh == "before" else old.eigenvalues
        given = map_blocks(_hand_on, blocks, factors, used)
        new, inner_state = tx.update(given, old.inner, params)
        count = optax.safe_increment(old.count)
        state = KLEigenbasisState(count, factors, eigenvalues, inner_state)
        return _keep_finite(new, state, old)

    return blocks_part(init, update)


def _statistics(
    blocks: Any, old: KLEigenbasisState, b2: Any, first_weight: Any, normalize: bool, cap: Any
) -> tuple[Any, Any]:
    """Factors and tracked eigenvalues after this gradient."""
    is_first = old.count == 0
    weight = jnp.where(is_first, first_weight, 1 - b2)

    def accumulate(b: Blocks, s: Matrices, q: Matrices, d: Matrices) -> Matrices:
        # The first gradient is whitened by nothing; bases are identities until it is used.
        scales = jax.tree.map(lambda d: jnp.where(is_first, 1.0, d**-0.5)[:, None, :], d)
        roots = jax.tree.map(lambda q, scale: (q * scale).swapaxes(1, 2), q, scales)
        new = whitened_contractions(b.gradient, s, roots, normalize)
        return jax.tree.map(lambda s, c: (b2 * s + weight * c).astype(s.dtype), s, new)

    def track(b: Blocks, q: Matrices, d: Matrices) -> Matrices:
        squares = apply_matrices(b.gradient, q, transpose=True) ** 2

        def one(old: Array, k: int) -> Array:
            new = b2 * old + (1 - b2) * _reduce(squares, d, k, normalize)
            return jnp.where(is_first, old, _capped(new, cap)).astype(old.dtype)

        return tuple(None if old is None else one(old, k) for k, old in enumerate(d))

    bases = old.inner.bases
    factors = map_blocks(accumulate, blocks, old.factors, bases, old.eigenvalues)
    return factors, map_blocks(track, blocks, bases, old.eigenvalues)


def _check_order(basis: Basis) -> None:
    """Raises ValueError for a basis that moves columns away from their eigenvalues."""
    if isinstance(basis, EighBasis) and not basis.descending:
        raise ValueError(
            f"basis={basis} sorts columns, their tracked eigenvalues are in descending order: use "
            "EighBasis(descending=True)."
        )
    if isinstance(basis, QRBasis) and basis.sort is not None:
        raise ValueError(
            f"basis={basis} sorts columns, their tracked eigenvalues stay: use QRBasis(sort=None)."
        )


def _first_eigenvalues(p: Blocks, exponents: Exponents) -> Matrices:
    full = lambda n, d, e: jnp.full((n, d), EIGENVALUE_INIT, p.update.dtype)  # noqa: E731
    return per_factor(full, p.update.shape, exponents)


def _hand_on(b: Blocks, factors: Matrices, eigenvalues: Matrices) -> Blocks:
    """Factors where `eigenbasis` reads them, eigenvalues where `_scale_by_eigenvalues` does."""
    figures = {f"eigenvalue/{k}": d for k, d in enumerate(eigenvalues) if d is not None}
    return dataclasses.replace(b, matrices=factors, figures={**b.figures, **figures})


def _scale_by_eigenvalues(eps: Any) -> Part:
    """Multiplies the update by `s / (1 + eps s)` of the eigenvalues among the figures."""

    def scale(b: Blocks) -> Blocks:
        s = jnp.ones([], b.update.dtype)
        for k in range(b.order):
            if f"eigenvalue/{k}" in b.figures:
                s = s * along(b.figures[f"eigenvalue/{k}"] ** -0.5, k, b.update.ndim)
        return dataclasses.replace(b, update=b.update * (s / (1 + eps * s)))

    return blocks_part(
        lambda params: optax.EmptyState(),
        lambda blocks, state, params: (map_blocks(scale, blocks), state),
    )


def _reduce(squares: Array, eigenvalues: Matrices, dim: int, normalize: bool) -> Array:
    """Mean or sum of `P^2 / prod_{j != dim} d_j` over all dimensions but one: `[N, d]`."""
    for j, d in enumerate(eigenvalues):
        if d is not None and j != dim:
            squares = squares / along(d, j, squares.ndim)
    others = [k + 1 for k in range(squares.ndim - 1) if k != dim]
    return squares.mean(others) if normalize else squares.sum(others)


def _capped(d: Array, cap: str | float) -> Array:
    """Eigenvalues bounded from below such that `d^(-1/2)` is at most the cap."""
    largest = max(10, min(d.shape[1], 4000)) if cap == "size" else float(cap)
    return jnp.maximum(jnp.maximum(d, EIGENVALUE_FLOOR), largest**-2)


def _keep_finite(
    blocks: Any, new: KLEigenbasisState, old: KLEigenbasisState
) -> tuple[Any, KLEigenbasisState]:
    """Zero update, old state and a failure more for blocks in which something is not finite."""
    stacks = [p for p, _ in jax.tree_util.tree_leaves_with_path(blocks, is_leaf=is_blocks)]
    leaves = jax.tree_util.tree_leaves_with_path(new)
    owned = [(stack_of(path, stacks), x) for path, x in leaves if jnp.ndim(x)]

    def finite(path: Any, b: Blocks) -> Array:
        arrays = [b.update, *(x for owner, x in owned if owner == path)]
        each = [jnp.isfinite(x).all(tuple(range(1, x.ndim))) for x in arrays]
        return functools.reduce(jnp.logical_and, each)

    def report(b: Blocks, ok: Array, failures: Array) -> Blocks:
        update = where_block(ok, b.update, jnp.zeros_like(b.update))
        return dataclasses.replace(b, update=update, figures={**b.figures, "failures": failures})

    ok = jax.tree_util.tree_map_with_path(finite, blocks, is_leaf=is_blocks)
    state = where_blocks(ok, new, old)
    failures = jax.tree.map(lambda n, ok: n + ~ok, state.inner.failures, ok)
    state = state._replace(inner=state.inner._replace(failures=failures))
    return map_blocks(report, blocks, ok, failures), state
