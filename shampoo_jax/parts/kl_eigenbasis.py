"""KL-Shampoo and KL-SOAP in their practical form: eigenbases, and eigenvalues tracked apart."""

import dataclasses
import functools
import math
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
    norms,
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

# Largest d^(-1/2) of `max_scale="size"` lies between these, as it does in that code.
SIZE_BOUNDS = 10, 4000
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
    first_eigenvalue: float | Array = EIGENVALUE_INIT,
    rtol: float | None = 0.0,
) -> Part:
    """KL-Shampoo and KL-SOAP in their practical form: bases by QR, eigenvalues tracked apart.

    In the eigenbases, with `P = Ql^T G Qr` and `s = d^(-1/2)` of the tracked eigenvalues:

      `L <- b2 L + (1 - b2)/n G Qr diag(1/dr) Qr^T G^T`, `R` likewise,
      `dl <- b2 dl + (1 - b2) mean_j P_ij^2 / dr_j`, `dr` likewise with the old `dl`,
      `Q <- qr(S Q)` every `every` steps, all after the update has been made.

    The first gradient only fills factors and bases; all eigenvalues start at 0.1. Source: Lin et
    al. 2025, arXiv:2509.03378, and its authors' code.

    The least eigenvalue of a factor is `max_scale^-2`, so blocks whose gradients have a root mean
    square below the product of `1 / max_scale` over dimensions, 1/256 for 16 x 16 and 2e-6 for
    768 x 768 by default, meet it in all directions for ever: their update is the first moment
    times a constant. A monitor's figure `capped` tells; `max_scale="relative"` has no such limit.

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
        `"relative"` means the same as a multiple of a factor's smallest s, with eigenvalues that
        start at `r^(2/n)`, r the root mean square of a block's first gradient that is not zero and
        n its number of factors, and a first gradient that is whitened by these: multiplying every
        gradient by a constant then changes nothing but through eps.
      first_eigenvalue: Of all, unless `max_scale="relative"`.
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
    check_options(locals() | {"b2": 0.0})
    check_range("b2", b2)
    when = refresh_of_bases(refresh)
    inside = optax.chain(inner, _scale_by_eigenvalues(eps)) if scaled else inner
    method = make_basis(basis, keep_order=True)
    tx = eigenbasis(inside, basis=method, every=every, refresh=when, rtol=rtol)
    form = _Form(b2, 1 - b2 if first_weight is None else first_weight, normalize, max_scale)

    def init(params: Stacks) -> KLEigenbasisState:
        first = functools.partial(_first_eigenvalues, 0.0 if form.relative else first_eigenvalue)
        factors, eigenvalues = each(zero_factors, params), each(first, params)
        return KLEigenbasisState(jnp.zeros([], jnp.int32), factors, eigenvalues, tx.init(params))

    def update(stacks: Stacks, old: KLEigenbasisState, params: Any, **extra: Any) -> Step:
        factors, eigenvalues, given = {}, {}, {}
        for key, b in stacks.items():
            begun = _begin(form, old, key, b)
            factors[key], eigenvalues[key] = _statistics(form, old, key, b, begun)
            used = eigenvalues[key] if when.when == "before" else begun.eigenvalues
            figures = {**b.figures, **_capped(form, eigenvalues[key])}
            # Factors where `eigenbasis` reads them, eigenvalues where `_scale_by_eigenvalues` does.
            given[key] = dataclasses.replace(
                b, matrices=factors[key], eigenvalues=used, figures=figures
            )
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

    @property
    def relative(self) -> bool:
        """Whether eigenvalues are in units of the gradients."""
        return self.max_scale == "relative"


class _Begun(NamedTuple):
    """Eigenvalues before a gradient enters them, and whether it is the first one."""

    eigenvalues: Matrices
    whitening: Matrices  # what the gradient is whitened by, `[N, d]`
    is_first: Array  # bool[] or, by block, bool[N, 1]


def _begin(form: _Form, old: KLEigenbasisState, key: str, b: Blocks) -> _Begun:
    """Eigenvalues to use; relative ones start with a block's first gradient that is not zero."""
    eigenvalues = old.eigenvalues[key]
    count = sum(d is not None for d in eigenvalues)
    if not (form.relative and count):
        is_first = old.count == 0
        # The first gradient is whitened by nothing; bases are identities until it is used.
        scales = jax.tree.map(lambda d: jnp.where(is_first, 1.0, d), eigenvalues)
        return _Begun(eigenvalues, scales, is_first)
    is_first = ~jax.tree.leaves(eigenvalues)[0].any(-1, keepdims=True)
    size = norms(b.gradient)[:, None] / math.prod(b.shape) ** 0.5
    # Without any gradient yet, 1 is as good as any number.
    start = jnp.where(size > 0, size, 1.0) ** (2 / count)
    begun = jax.tree.map(lambda d: jnp.where(is_first, start, d), eigenvalues)
    return _Begun(begun, begun, is_first)


def _statistics(
    form: _Form, old: KLEigenbasisState, key: str, b: Blocks, begun: _Begun
) -> tuple[Any, Any]:
    """Factors and tracked eigenvalues of a stack after this gradient."""
    factors, q, (eigenvalues, whitening, is_first) = old.factors[key], old.inner.bases[key], begun
    weight = jnp.where(is_first, form.first_weight, 1 - form.b2)
    weight = weight[:, :, None] if weight.ndim else weight
    roots = jax.tree.map(lambda q, d: (q * d[:, None, :] ** -0.5).swapaxes(1, 2), q, whitening)
    squares = whitened_squares(b.gradient, factors, roots, form.normalize)
    new = jax.tree.map(lambda s, c: (form.b2 * s + weight * c).astype(s.dtype), factors, squares)
    energies = apply_matrices(b.gradient, q, transpose=True) ** 2
    # A block without any gradient goes on waiting for its first one.
    waits = is_first & (norms(b.gradient)[:, None] == 0) if form.relative else jnp.array(False)

    def track(old: Array | None, k: int) -> Array | None:
        if old is None:
            return None
        fresh = form.b2 * old + (1 - form.b2) * _reduce(energies, eigenvalues, k, form.normalize)
        fresh = jnp.where(is_first, old, jnp.maximum(fresh, _least(fresh, form)))
        return jnp.where(waits, 0.0, fresh).astype(old.dtype)

    return new, tuple(track(old, k) for k, old in enumerate(eigenvalues))


def _first_eigenvalues(value: Any, p: Blocks) -> Matrices:
    return p.per_factor(lambda n, d, e: jnp.full((n, d), value, p.update.dtype))


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


def _least(d: Array, form: _Form) -> Array:
    """Bound of eigenvalues `[N, d]` from below, such that `d^(-1/2)` is at most `max_scale`."""
    low, high = SIZE_BOUNDS
    by_size = max(low, min(d.shape[1], high)) ** -2
    if form.relative:
        return by_size * d.max(-1, keepdims=True)
    bound = by_size if form.max_scale == "size" else float(form.max_scale) ** -2
    return jnp.maximum(jnp.asarray(EIGENVALUE_FLOOR, d.dtype), bound)


def _capped(form: _Form, eigenvalues: Matrices) -> dict[str, Array]:
    """Figures for a monitor: the share of eigenvalues at their bound, `[N]` by dimension."""
    found = {}
    for k, d in enumerate(eigenvalues):
        if d is not None:
            # Rounding may differ by an ulp from where they were bounded.
            found[f"capped/{k}"] = (d <= _least(d, form) * (1 + 1e-6)).mean(-1).astype(d.dtype)
    return found


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
