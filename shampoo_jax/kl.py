"""Statistics that minimize a Kullback-Leibler divergence: each side whitened by the others."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.bases import Basis, EighBasis, QRBasis
from shampoo_jax.blocks import Blocks, Part, blocks_part, map_blocks
from shampoo_jax.eigenbasis import (
    Matrices,
    Move,
    carry,
    report_bases,
    rotate,
    rotate_back,
    when,
)
from shampoo_jax.exponents import Exponents, default_exponents
from shampoo_jax.factors import (
    contract,
    decay_factors,
    factor_correction,
    zero_factors,
)
from shampoo_jax.filtering import check_range
from shampoo_jax.roots import apply_matrices, check_schedule, identity_roots

Array = jax.Array

# Smallest tracked eigenvalue, and the first value of all (authors' code of arXiv:2509.03378).
EIGENVALUE_FLOOR = 1e-30
EIGENVALUE_INIT = 0.1


class AccumulateKLFactorsState(NamedTuple):
    """State of `accumulate_kl_factors`."""

    count: Array  # int32[], steps taken
    factors: Any  # per stack a tuple over dimensions of float32 [N, d, d] or None
    inner: Any  # state of the part that turns factors into roots


def accumulate_kl_factors(
    inner_roots: optax.GradientTransformation,
    b2: float | Array = 0.9,
    *,
    exponents: Exponents = default_exponents,
    bias_correction: bool = True,
    weighted: bool = True,
    normalize: bool = False,
) -> Part:
    """Factors of the gradient preconditioned by the previous roots of all other dimensions.

    `S_k = b2 * S_k + w * H_(k) H_(k)^T` with `H = G x_{j != k} P_j`, `P_j` the roots before this
    step. With exponents 1/2 this is KL-Shampoo's fixed-point iteration (Lin et al. 2025,
    arXiv:2509.03378, eq. for S_a and S_b); with a single dimension it is plain Shampoo.

    Args:
      inner_roots: Part that turns factors into roots and keeps them in a state field `roots`, such
        as `invert_roots`.
      b2: Decay in [0, 1].
      exponents: As given to `inner_roots`.
      bias_correction: Whether factors are reported divided by `1 - b2^t`.
      weighted: Whether `w = 1 - b2`; False adds with weight 1, uncorrected.
      normalize: Whether `H_(k) H_(k)^T` is divided by its number of columns, as in the paper.

    Returns:
      A part that stands for statistics and roots together.

    Raises:
      ValueError: `b2` outside [0, 1].
    """
    check_range("b2", b2, closed=True)
    tx = optax.with_extra_args_support(inner_roots)

    def init(params: Any) -> AccumulateKLFactorsState:
        factors = map_blocks(lambda p: zero_factors(p, exponents), params)
        return AccumulateKLFactorsState(jnp.zeros([], jnp.int32), factors, tx.init(params))

    def update(blocks: Any, state: AccumulateKLFactorsState, params: Any) -> tuple[Any, Any]:
        count = optax.safe_increment(state.count)

        def accumulate(b: Blocks, factors: Matrices, roots: Matrices) -> Matrices:
            new = _whitened_contractions(b.gradient, factors, roots, normalize)
            return decay_factors(factors, new, b2, weighted)

        def report(b: Blocks, factors: Matrices) -> Blocks:
            scale = factor_correction(b2, count, b.gradient.dtype, bias_correction and weighted)
            matrices = tuple(None if s is None else s / scale for s in factors)
            return dataclasses.replace(b, matrices=matrices)

        factors = map_blocks(accumulate, blocks, state.factors, state.inner.roots)
        new, inner = tx.update(map_blocks(report, blocks, factors), state.inner, params)
        return new, AccumulateKLFactorsState(count, factors, inner)

    return blocks_part(init, update)


def _whitened_contractions(
    g: Array, factors: Matrices, roots: Matrices, normalize: bool
) -> list[Array | None]:
    """`H_(k) H_(k)^T` for every dimension that has a factor."""
    new: list[Array | None] = []
    for k, factor in enumerate(factors):
        if factor is None:
            new.append(None)
            continue
        others = tuple(None if j == k else p for j, p in enumerate(roots))
        h = contract(apply_matrices(g, others), k)
        new.append(h / (g[0].size // g.shape[k + 1]) if normalize else h)
    return new


class KLEigenbasisState(NamedTuple):
    """State of `kl_eigenbasis`."""

    count: Array  # int32[], steps taken
    factors: Any  # per stack a tuple over dimensions of [N, d, d] or None
    bases: Any  # likewise, orthogonal
    eigenvalues: Any  # per stack a tuple over dimensions of [N, d] or None, tracked on their own
    inner: Any


def kl_eigenbasis(
    inner: optax.GradientTransformation,
    b2: float | Array = 0.98,
    *,
    scaled: bool,
    eps: float | Array = 1e-8,
    first_weight: float | Array | None = None,
    exponents: Exponents = default_exponents,
    basis: Basis | None = None,
    every: int | Array = 10,
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

    Args:
      inner: Part that runs in the eigenbasis; its `mu` is carried into new bases.
      b2: Decay of factors and eigenvalues.
      scaled: True multiplies the update by `s / (1 + eps s)`, `s_ij = sl_i sr_j` (KL-Shampoo);
        False leaves the scaling to `inner` (KL-SOAP).
      eps: See `scaled`.
      first_weight: Weight of the first gradient in the factors; None means `1 - b2`.
      exponents: Dimensions with exponent 0 are left alone; the values do not matter.
      basis: How bases are refreshed; None means one unsorted QR step.
      every: Steps between refreshes.
      cap: Largest s: `"size"` means `max(10, min(d, 4000))`, the authors' choice.
      rtol: Directions whose tracked eigenvalue is at most `rtol` times the largest get a zero
        update; 0.0 truncates nothing, None means `d * eps` of the dtype.

    Returns:
      A part that stands for statistics, roots and preconditioning together.

    Raises:
      ValueError: `b2` outside [0, 1), or `every` below 1.
    """
    check_range("b2", b2)
    check_schedule(every, None)
    tx = optax.with_extra_args_support(inner)
    basis = QRBasis(sort=None) if basis is None else basis
    weight = 1 - b2 if first_weight is None else first_weight

    def init(params: Any) -> KLEigenbasisState:
        return KLEigenbasisState(
            jnp.zeros([], jnp.int32),
            map_blocks(lambda p: zero_factors(p, exponents), params),
            map_blocks(lambda p: identity_roots(p, exponents), params),
            map_blocks(lambda p: _first_eigenvalues(p, exponents), params),
            tx.init(params),
        )

    def update(blocks: Any, state: KLEigenbasisState, params: Any) -> tuple[Any, Any]:
        count = optax.safe_increment(state.count)
        is_first = count == 1
        rotated = map_blocks(rotate, blocks, state.bases)
        done, inner = tx.update(rotated, state.inner, params)
        done = map_blocks(lambda b, d: _finish(b, d, scaled, eps, rtol), done, state.eigenvalues)
        new = map_blocks(rotate_back, done, blocks, state.bases)
        new = map_blocks(
            lambda b: dataclasses.replace(
                b, update=jnp.where(is_first, 0.0, b.update), ready=~is_first
            ),
            new,
        )
        used, previous = state._replace(count=count, inner=inner), state.bases
        state = jax.lax.cond(
            is_first,
            lambda: _start(blocks, state._replace(count=count), weight),
            lambda: when(
                ((count - 1) % every) == 0,
                lambda s: _refresh(s, basis),
                _accumulate(blocks, used, b2, cap),
            ),
        )
        return map_blocks(report_bases, new, previous, state.bases, state.factors), state

    return blocks_part(init, update)


def _start(blocks: Any, state: KLEigenbasisState, weight: Any) -> KLEigenbasisState:
    """Factors and bases of the first gradient."""

    def first(b: Blocks, factors: Matrices) -> Matrices:
        new = _whitened_contractions(b.gradient, factors, (None,) * b.order, True)
        return tuple(None if c is None else weight * c for c in new)

    factors = map_blocks(first, blocks, state.factors)
    bases = map_blocks(
        lambda b, s, q: _new_bases(s, q, EighBasis(descending=True)), blocks, factors, state.bases
    )
    return state._replace(factors=factors, bases=bases)


def _accumulate(blocks: Any, state: KLEigenbasisState, b2: Any, cap: Any) -> KLEigenbasisState:
    """Factors and eigenvalues after a later gradient."""

    def accumulate(b: Blocks, s: Matrices, q: Matrices, d: Matrices) -> Matrices:
        whiten = tuple(
            None if q_k is None or d_k is None else (q_k * (d_k**-0.5)[:, None, :]).swapaxes(1, 2)
            for q_k, d_k in zip(q, d, strict=True)
        )
        return decay_factors(s, _whitened_contractions(b.gradient, s, whiten, True), b2, True)

    def track(b: Blocks, q: Matrices, d: Matrices) -> Matrices:
        squares = apply_matrices(b.gradient, q, transpose=True) ** 2
        return tuple(
            None if old is None else _capped(b2 * old + (1 - b2) * _mean_over(squares, d, k), cap)
            for k, old in enumerate(d)
        )

    factors = map_blocks(accumulate, blocks, state.factors, state.bases, state.eigenvalues)
    eigenvalues = map_blocks(track, blocks, state.bases, state.eigenvalues)
    return state._replace(factors=factors, eigenvalues=eigenvalues)


def _refresh(state: KLEigenbasisState, basis: Basis) -> KLEigenbasisState:
    """New bases from the factors, first moments carried along."""

    def per_stack(f: Any, *trees: Any) -> Any:
        return jax.tree.map(f, *trees, is_leaf=lambda x: isinstance(x, tuple))

    bases = per_stack(lambda s, q: _new_bases(s, q, basis), state.factors, state.bases)
    moves = per_stack(lambda q, new: Move(q, new, ()), state.bases, bases)
    return state._replace(bases=bases, inner=carry(state.inner, moves, ("mu",), False))


def _first_eigenvalues(p: Blocks, exponents: Exponents) -> Matrices:
    n, *shape = p.update.shape
    return tuple(
        jnp.full((n, d), EIGENVALUE_INIT, p.update.dtype) if e else None
        for d, e in zip(shape, exponents(len(shape)), strict=True)
    )


def _new_bases(factors: Matrices, bases: Matrices, method: Basis) -> Matrices:
    return tuple(
        None if s is None or q is None else method(s, q)[1]
        for s, q in zip(factors, bases, strict=True)
    )


def _along(x: Array, dim: int, ndim: int) -> Array:
    """`[N, d]` shaped to broadcast along dimension `dim` of a stack with `ndim` axes."""
    shape = [len(x), *[1] * (ndim - 1)]
    shape[dim + 1] = x.shape[1]
    return x.reshape(shape)


def _mean_over(squares: Array, eigenvalues: Matrices, dim: int) -> Array:
    """Mean of `P^2 / prod_{j != dim} d_j` over all dimensions but one: `[N, d]`."""
    for j, d in enumerate(eigenvalues):
        if d is not None and j != dim:
            squares = squares / _along(d, j, squares.ndim)
    return squares.mean([k + 1 for k in range(squares.ndim - 1) if k != dim])


def _capped(d: Array, cap: str | float) -> Array:
    """Eigenvalues bounded from below such that `d^(-1/2)` is at most the cap."""
    largest = max(10, min(d.shape[1], 4000)) if cap == "size" else float(cap)
    return jnp.maximum(jnp.maximum(d, EIGENVALUE_FLOOR), largest**-2)


def _finish(b: Blocks, eigenvalues: Matrices, scaled: bool, eps: Any, rtol: Any) -> Blocks:
    """Scales the rotated update by the tracked eigenvalues and truncates it."""
    s, keep = jnp.ones([], b.update.dtype), jnp.array(True)
    for k, d in enumerate(eigenvalues):
        if d is None:
            continue
        s = s * _along(d**-0.5, k, b.update.ndim)
        limit = d.shape[1] * float(jnp.finfo(d.dtype).eps) if rtol is None else rtol
        keep = keep & _along(d > limit * d.max(1, keepdims=True), k, b.update.ndim)
    update = b.update * (s / (1 + eps * s)) if scaled else b.update
    return dataclasses.replace(b, update=jnp.where(keep, update, 0.0))
