"""Statistics that minimize a Kullback-Leibler divergence: each side whitened by the others."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.bases import Basis, EighBasis, QRBasis
from shampoo_jax.blocks import Blocks, Part, blocks_part, is_blocks, map_blocks, where_block
from shampoo_jax.eigenbasis import (
    Matrices,
    Move,
    carry,
    new_basis,
    report_bases,
    report_failures,
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
from shampoo_jax.paths import stack_of
from shampoo_jax.roots import apply_matrices, check_schedule, identity_roots, no_failures

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
      inner_roots: Part that turns factors into roots, `invert_roots` alone or in a chain: one state
        in it keeps them in a field `roots`.
      b2: Decay in [0, 1].
      exponents: As given to `inner_roots`.
      bias_correction: Whether factors are reported divided by `1 - b2^t`.
      weighted: Whether `w = 1 - b2`; False adds with weight 1, uncorrected.
      normalize: Whether `H_(k) H_(k)^T` is divided by its number of columns, as in the paper.

    Returns:
      A part that stands for statistics and roots together.

    Raises:
      ValueError: `b2` outside [0, 1]; at init, a part that keeps no roots.
    """
    check_range("b2", b2, closed=True)
    tx = optax.with_extra_args_support(inner_roots)

    def init(params: Any) -> AccumulateKLFactorsState:
        factors = map_blocks(lambda p: zero_factors(p, exponents), params)
        inner = tx.init(params)
        _roots_in(inner)
        return AccumulateKLFactorsState(jnp.zeros([], jnp.int32), factors, inner)

    def update(blocks: Any, state: AccumulateKLFactorsState, params: Any) -> tuple[Any, Any]:
        count = optax.safe_increment(state.count)

        def accumulate(b: Blocks, factors: Matrices, roots: Matrices) -> Matrices:
            new = _whitened_contractions(b.gradient, factors, roots, normalize)
            return decay_factors(factors, new, b2, weighted)

        def report(b: Blocks, factors: Matrices) -> Blocks:
            scale = factor_correction(b2, count, b.gradient.dtype, bias_correction and weighted)
            matrices = tuple(None if s is None else s / scale for s in factors)
            return dataclasses.replace(b, matrices=matrices)

        factors = map_blocks(accumulate, blocks, state.factors, _roots_in(state.inner))
        new, inner = tx.update(map_blocks(report, blocks, factors), state.inner, params)
        return new, AccumulateKLFactorsState(count, factors, inner)

    return blocks_part(init, update)


def _roots_in(state: Any) -> Any:
    """The roots in the state of a part, or of a chain of parts."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "roots"))
    found = [node.roots for node in nodes if hasattr(node, "roots")]
    if len(found) != 1:
        raise ValueError(
            f"inner_roots keeps {len(found)} sets of roots, one is needed: give invert_roots(...), "
            "alone or in optax.chain with parts that change factors."
        )
    return found[0]


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
    failures: Any  # per stack int32[N], steps and refreshes so far that kept old values
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

    Where a finite gradient makes something of a block overflow, the block keeps its factors, bases,
    eigenvalues and inner state, its update is zero, and this is counted.

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
            map_blocks(no_failures, params),
            tx.init(params),
        )

    def update(blocks: Any, state: KLEigenbasisState, params: Any) -> tuple[Any, Any]:
        count = optax.safe_increment(state.count)
        is_first = count == 1
        rotated = map_blocks(rotate, blocks, state.bases)
        done, inner = tx.update(rotated, state.inner, params)
        done = map_blocks(lambda b, d: _finish(b, d, scaled, eps, rtol), done, state.eigenvalues)
        new = map_blocks(rotate_back, done, blocks, state.bases)
        old, previous = state._replace(count=count), state.bases
        state = jax.lax.cond(
            is_first,
            lambda: _start(blocks, old, weight),
            lambda: when(
                ((count - 1) % every) == 0,
                lambda s: _refresh(blocks, s, basis),
                _accumulate(blocks, old._replace(inner=inner), b2, cap),
            ),
        )
        ok = _finite(new, state)
        state = _keep_finite(ok, state, old)

        def report(b: Blocks, ok: Array) -> Blocks:
            update = where_block(ok & ~is_first, b.update, jnp.zeros_like(b.update))
            return dataclasses.replace(b, update=update, ready=~is_first)

        new = map_blocks(report_failures, map_blocks(report, new, ok), state.failures)
        return map_blocks(report_bases, new, previous, state.bases, state.factors), state

    return blocks_part(init, update)


def _finite(blocks: Any, state: KLEigenbasisState) -> Any:
    """Whether update and state of each block are finite: `bool[N]` by stack."""
    stacks = [p for p, _ in jax.tree_util.tree_leaves_with_path(blocks, is_leaf=is_blocks)]
    inner = [
        (stack_of(path, stacks), x)
        for path, x in jax.tree_util.tree_leaves_with_path(state.inner)
        if jnp.ndim(x)
    ]

    def one(path: Any, b: Blocks, *kept: Matrices) -> Array:
        own = [x for owner, x in inner if owner == path]
        arrays = [b.update, *own, *(x for xs in kept for x in xs if x is not None)]
        return functools.reduce(
            jnp.logical_and, (jnp.isfinite(x).all(tuple(range(1, x.ndim))) for x in arrays)
        )

    return jax.tree_util.tree_map_with_path(
        one, blocks, state.factors, state.bases, state.eigenvalues, is_leaf=is_blocks
    )


def _keep_finite(ok: Any, new: KLEigenbasisState, old: KLEigenbasisState) -> KLEigenbasisState:
    """Per block, the new state where it is finite, else the old one and a failure more."""
    stacks = dict(jax.tree_util.tree_leaves_with_path(ok))

    def matrices(ok: Array, new: Matrices, old: Matrices) -> Matrices:
        return jax.tree.map(functools.partial(where_block, ok), new, old)

    def leaf(path: Any, new: Array, old: Array) -> Array:
        owner = stack_of(path, stacks) if jnp.ndim(new) else None
        return new if owner is None else where_block(stacks[owner], new, old)

    return KLEigenbasisState(
        new.count,
        jax.tree.map(matrices, ok, new.factors, old.factors),
        jax.tree.map(matrices, ok, new.bases, old.bases),
        jax.tree.map(matrices, ok, new.eigenvalues, old.eigenvalues),
        jax.tree.map(lambda ok, n, o: jnp.where(ok, n, o + 1), ok, new.failures, old.failures),
        jax.tree_util.tree_map_with_path(leaf, new.inner, old.inner),
    )


def _start(blocks: Any, state: KLEigenbasisState, weight: Any) -> KLEigenbasisState:
    """Factors and bases of the first gradient."""

    def first(b: Blocks, factors: Matrices) -> Matrices:
        new = _whitened_contractions(b.gradient, factors, (None,) * b.order, True)
        return tuple(None if c is None else weight * c for c in new)

    factors = map_blocks(first, blocks, state.factors)
    return _rebased(blocks, state._replace(factors=factors), EighBasis(descending=True))


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


def _refresh(blocks: Any, state: KLEigenbasisState, basis: Basis) -> KLEigenbasisState:
    """New bases from the factors, first moments carried along."""
    new = _rebased(blocks, state, basis)
    moves = map_blocks(lambda b, q, q_new: Move(q, q_new, ()), blocks, state.bases, new.bases)
    return new._replace(inner=carry(state.inner, moves, ("mu",), False))


def _rebased(blocks: Any, state: KLEigenbasisState, method: Basis) -> KLEigenbasisState:
    """The state with bases of its factors; one that is not finite is refused and counted."""
    new = map_blocks(
        lambda b, s, q: _new_bases(b, s, q, method), blocks, state.factors, state.bases
    )
    return state._replace(
        bases=map_blocks(lambda b, n: n[0], blocks, new),
        failures=map_blocks(lambda b, f, n: f + n[1], blocks, state.failures, new),
    )


def _first_eigenvalues(p: Blocks, exponents: Exponents) -> Matrices:
    n, *shape = p.update.shape
    return tuple(
        jnp.full((n, d), EIGENVALUE_INIT, p.update.dtype) if e else None
        for d, e in zip(shape, exponents(len(shape)), strict=True)
    )


def _new_bases(
    b: Blocks, factors: Matrices, bases: Matrices, method: Basis
) -> tuple[Matrices, Array]:
    """Bases of one stack, and per block whether one of them had to stay."""
    new, failed = list(bases), jnp.zeros(len(b.update), bool)
    for k, (s, q) in enumerate(zip(factors, bases, strict=True)):
        if s is not None and q is not None:
            _, new[k], _, ok = new_basis(s, q, method)
            failed |= ~ok
    return tuple(new), failed


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
