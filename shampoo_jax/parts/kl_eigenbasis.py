"""KL-Shampoo and KL-SOAP in their practical form: eigenbases, and eigenvalues tracked apart."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import check_options, check_range
from shampoo_jax.blocks.blocks import (
    Blocks,
    Matrices,
    Part,
    Stacks,
    along,
    each,
    make_part,
    stateless,
    where_block,
)
from shampoo_jax.matrix.products import apply_matrices
from shampoo_jax.parts.change_of_basis import per_stack
from shampoo_jax.parts.eigenbasis import eigenbasis
from shampoo_jax.parts.factors import zero_factors
from shampoo_jax.parts.kl_factors import whitened_squares
from shampoo_jax.parts.refresh import BasisRefresh, refresh_of_bases
from shampoo_jax.solvers.bases import Basis, make_basis

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


Step = tuple[Stacks, KLEigenbasisState]


def kl_eigenbasis(
    inner: optax.GradientTransformation,
    b2: float | Array = 0.98,
    *,
    scaled: bool,
    eps: float | Array = 1e-8,
    first_weight: float | Array | None = None,
    normalize: bool = True,
    basis: Basis | None = None,
    every: int | Array = 10,
    refresh: BasisRefresh | None = None,
    max_scale: str | float = "size",
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
      eps: Damping of s, with `scaled` alone.
      first_weight: Weight of the first gradient in the factors; None means `1 - b2`.
      normalize: Whether factors and eigenvalues are means over the other dimensions (the `1/n` and
        the mean above); False sums over them.
      basis: How bases are refreshed; None means one unsorted QR step. It may not change the order
        of columns, which is that of the eigenvalues.
      every: Steps between refreshes.
      refresh: `when="after"`, the default, uses each gradient before it enters factors, eigenvalues
        and bases, as above; `"before"` lets it enter them first, with identities for bases until
        step `every`. Without `skip_first` the first update is made with eigenvalues 0.1, so that
        with `scaled` it is on the scale of the gradients.
      max_scale: Largest s: `"size"` means `max(10, min(d, 4000))`, the authors' choice.
      rtol: Directions whose eigenvalue is at most `rtol` times a factor's largest get a zero
        update; 0.0 truncates nothing, None means `d * eps` of the dtype.

    Returns:
      A part that stands for statistics, roots and preconditioning together.

    Raises:
      ValueError: `b2` outside [0, 1), a basis that sorts, or what `eigenbasis` refuses.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> lion = shampoo_jax.from_gradients(optax.scale_by_lion())
      >>> tx = shampoo_jax.blocked(shampoo_jax.kl_eigenbasis(lion, scaled=False))
      >>> updates, state = tx.update({"w": jnp.eye(2)}, tx.init({"w": jnp.eye(2)}))
      >>> updates["w"].shape
      (2, 2)
    """
    check_range("b2", b2)
    check_options({"eps": eps, "first_weight": first_weight, "max_scale": max_scale})
    when = refresh_of_bases(refresh)
    inside = optax.chain(inner, _scale_by_eigenvalues(eps)) if scaled else inner
    method = make_basis(basis, keep_order=True)
    tx = eigenbasis(inside, basis=method, every=every, refresh=when, rtol=rtol)
    form = _Form(b2, 1 - b2 if first_weight is None else first_weight, normalize, max_scale)

    def init(params: Stacks) -> KLEigenbasisState:
        factors, eigenvalues = each(zero_factors, params), each(_first_eigenvalues, params)
        return KLEigenbasisState(jnp.zeros([], jnp.int32), factors, eigenvalues, tx.init(params))

    def update(stacks: Stacks, old: KLEigenbasisState, params: Any, **extra: Any) -> Step:
        factors, eigenvalues, given = {}, {}, {}
        for key, b in stacks.items():
            factors[key], eigenvalues[key] = _statistics(form, old, key, b)
            used = eigenvalues[key] if when.when == "before" else old.eigenvalues[key]
            # Factors where `eigenbasis` reads them, eigenvalues where `_scale_by_eigenvalues` does.
            given[key] = dataclasses.replace(b, matrices=factors[key], eigenvalues=used)
        new, inner = tx.update(given, old.inner, params, **extra)
        count = optax.safe_increment(old.count)
        return _keep_finite(new, KLEigenbasisState(count, factors, eigenvalues, inner), old)

    return make_part(init, update)


class _Form(NamedTuple):
    """How statistics are accumulated, see `kl_eigenbasis`."""

    b2: Any
    first_weight: Any
    normalize: bool
    max_scale: str | float


def _statistics(form: _Form, old: KLEigenbasisState, key: str, b: Blocks) -> tuple[Any, Any]:
    """Factors and tracked eigenvalues of a stack after this gradient."""
    factors, eigenvalues, q = old.factors[key], old.eigenvalues[key], old.inner.bases[key]
    is_first = old.count == 0
    weight = jnp.where(is_first, form.first_weight, 1 - form.b2)
    # The first gradient is whitened by nothing; bases are identities until it is used.
    scales = jax.tree.map(lambda d: jnp.where(is_first, 1.0, d**-0.5)[:, None, :], eigenvalues)
    roots = jax.tree.map(lambda q, scale: (q * scale).swapaxes(1, 2), q, scales)
    squares = whitened_squares(b.gradient, factors, roots, form.normalize)
    new = jax.tree.map(lambda s, c: (form.b2 * s + weight * c).astype(s.dtype), factors, squares)
    energies = apply_matrices(b.gradient, q, transpose=True) ** 2

    def track(old: Array | None, k: int) -> Array | None:
        if old is None:
            return None
        fresh = form.b2 * old + (1 - form.b2) * _reduce(energies, eigenvalues, k, form.normalize)
        return jnp.where(is_first, old, _bounded(fresh, form.max_scale)).astype(old.dtype)

    return new, tuple(track(old, k) for k, old in enumerate(eigenvalues))


def _first_eigenvalues(p: Blocks) -> Matrices:
    return p.per_factor(lambda n, d, e: jnp.full((n, d), EIGENVALUE_INIT, p.update.dtype))


def _scale_by_eigenvalues(eps: Any) -> Part:
    """Multiplies the update by `s / (1 + eps s)` of the eigenvalues."""

    def scale(b: Blocks) -> Blocks:
        s = jnp.ones([], b.update.dtype)
        for k, d in enumerate(b.eigenvalues):
            if d is not None:
                s = s * along(d**-0.5, k, b.update.ndim)
        return dataclasses.replace(b, update=b.update * (s / (1 + eps * s)))

    return stateless(scale)


def _reduce(squares: Array, eigenvalues: Matrices, dim: int, normalize: bool) -> Array:
    """Mean or sum of `P^2 / prod_{j != dim} d_j` over all dimensions but one: `[N, d]`."""
    for j, d in enumerate(eigenvalues):
        if d is not None and j != dim:
            squares = squares / along(d, j, squares.ndim)
    others = [k + 1 for k in range(squares.ndim - 1) if k != dim]
    return squares.mean(others) if normalize else squares.sum(others)


def _bounded(d: Array, max_scale: str | float) -> Array:
    """Eigenvalues bounded from below such that `d^(-1/2)` is at most `max_scale`."""
    largest = max(10, min(d.shape[1], 4000)) if max_scale == "size" else float(max_scale)
    return jnp.maximum(jnp.maximum(d, EIGENVALUE_FLOOR), largest**-2)


def _keep_finite(stacks: Stacks, new: KLEigenbasisState, old: KLEigenbasisState) -> Step:
    """Zero update, old state and a failure more for blocks in which something is not finite."""
    (inner, replace), (before, _) = per_stack(new, stacks), per_stack(old, stacks)
    kept, failures = {}, {}
    for key, b in stacks.items():
        arrays = [b.update, *inner[key].values()]
        each_finite = [jnp.isfinite(x).all(tuple(range(1, x.ndim))) for x in arrays]
        ok = functools.reduce(jnp.logical_and, each_finite)
        inner[key] = {path: where_block(ok, x, before[key][path]) for path, x in inner[key].items()}
        failures[key] = where_block(ok, new.inner.failures[key], old.inner.failures[key]) + ~ok
        update = where_block(ok, b.update, jnp.zeros_like(b.update))
        figures = {**b.figures, "failures": failures[key]}
        kept[key] = dataclasses.replace(b, update=update, figures=figures)
    state = replace(inner)
    return kept, state._replace(inner=state.inner._replace(failures=failures))
