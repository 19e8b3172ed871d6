"""Running other transformations in the Kronecker eigenbasis of the factors: SOAP and relatives."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.bases import Basis, EighBasis
from shampoo_jax.blocks import (
    Blocks,
    Part,
    blocks_part,
    from_gradients,
    is_blocks,
    map_blocks,
    where_block,
)
from shampoo_jax.exponents import Exponents, default_exponents, per_factor
from shampoo_jax.matrix import eigh
from shampoo_jax.paths import KeyPath, stack_of
from shampoo_jax.refresh import check_schedule, refresh_due
from shampoo_jax.roots import apply_matrices, identity_roots, no_failures

Array = jax.Array
Matrices = tuple[Array | None, ...]
FIRST_MOMENTS = ("mu", "trace")  # fields of stock and own transformations, linear in the gradient


class EigenbasisState(NamedTuple):
    """State of `eigenbasis`."""

    count: Array  # int32[], steps taken
    bases: Any  # per stack a tuple over dimensions of orthogonal [N, d, d] or None
    keep: Any  # per stack a tuple over dimensions of bool [N, d] or None: not truncated
    failures: Any  # per stack int32[N], refreshes so far that kept an old basis
    inner: Any


class Refreshed(NamedTuple):
    """New bases of one stack, directions kept, how old columns were reordered, and failures."""

    bases: Matrices
    keep: Matrices
    order: Matrices
    failed: Array  # bool[N], whether the block kept an old basis


def eigenbasis(
    inner: optax.GradientTransformation,
    *,
    basis: Basis | None = None,
    exponents: Exponents = default_exponents,
    every: int | Array = 1,
    start: int | Array | None = None,
    refresh: Literal["before", "after"] = "before",
    skip_first: bool = False,
    rtol: float | None = 0.0,
    first_moments: Sequence[str] | None = None,
    reorder: bool = False,
) -> Part:
    """Rotates gradient and update into the eigenbases of the factors, runs `inner`, rotates back.

    With `Q_k` the eigenbasis of factor k, `inner` sees `G x_1 Q_1^T x_2 Q_2^T ...`; for a matrix
    that is `Ql^T G Qr`. With `scale_by_second_moment` inside this is SOAP (Vyas et al. 2024,
    arXiv:2409.11321), alias eigenvalue-corrected Shampoo.

    Parameters are rotated like the update, so decay inside `inner` is decay of the parameters. When
    bases change, state leaves of `inner` named in `first_moments` are carried along,
    `m <- m x_k Q_new^T Q_old`, so they go on describing the same tensor; all other leaves stay, or
    are permuted with the columns if `reorder`.

    Args:
      inner: Part of `Blocks`; its per-block state must have the blocks' shape.
      basis: How bases are refreshed; None means `EighBasis()`.
      exponents: Dimensions with exponent 0 are not rotated; the values do not matter.
      every: Steps between refreshes.
      start: With `refresh="before"`, the first step that refreshes; bases are identities until
        then. None means `every`.
      refresh: `"before"` refreshes from factors that include this step's gradient, then uses the
        new basis (Meta). `"after"` decomposes the first step's factors and from then on uses the
        old basis, so that a gradient is never rotated by a basis that has seen it (the papers).
      skip_first: With `"after"`, whether the first step only fills factors and bases: its update
        is zero and `inner` does not see it.
      rtol: Directions whose eigenvalue is at most `rtol` times the largest get a zero update; 0.0
        truncates nothing, None means `d * eps` of the dtype.
      first_moments: Names of state fields that are linear in the gradient; None means `mu` and
        `trace`, where there are any.
      reorder: Whether the other leaves follow when columns are reordered by `QRBasis`.

    Returns:
      A part; it reads `Blocks.matrices` as factors.

    Raises:
      ValueError: A schedule that makes no sense, `start` or `skip_first` beside the other
        `refresh`; at init an inner transformation whose state does not have the blocks' shape
        (factored second moments), or a given first moment that it does not have.
    """
    _check_refresh(every, start, refresh, skip_first)
    basis = EighBasis() if basis is None else basis
    first = every if start is None else start
    tx = optax.with_extra_args_support(inner)
    truncated = rtol is None or not (isinstance(rtol, (int, float)) and rtol == 0)

    def init(params: Any) -> EigenbasisState:
        state = tx.init(params)
        _check_elementwise(state, params)
        _check_named(state, params, first_moments or ())
        bases = map_blocks(lambda p: identity_roots(p, exponents), params)
        keep = map_blocks(lambda p: _keep_all(p, exponents) if truncated else (), params)
        failures = map_blocks(no_failures, params)
        return EigenbasisState(jnp.zeros([], jnp.int32), bases, keep, failures, state)

    def moved(method: Basis, blocks: Any, state: EigenbasisState) -> EigenbasisState:
        names = FIRST_MOMENTS if first_moments is None else first_moments
        return _move(blocks, state, method, rtol, names, reorder)

    def use(blocks: Any, state: EigenbasisState, params: Any) -> tuple[Any, Any]:
        rotated = map_blocks(rotate, blocks, state.bases)
        # Weight decay inside adds parameters to the update, which is rotated back.
        weights = None if params is None else map_blocks(rotate, params, state.bases)
        done, inner_state = tx.update(rotated, state.inner, weights)
        if truncated:
            done = map_blocks(_truncate, done, state.keep)
        return map_blocks(rotate_back, done, blocks, state.bases), state._replace(inner=inner_state)

    def update_before(blocks: Any, state: EigenbasisState, params: Any) -> tuple[Any, Any]:
        state = when(
            _always(every, first) or refresh_due(state.count, every, first),
            lambda s: moved(basis, blocks, s),
            state,
        )
        new, state = use(blocks, state, params)
        return _ready(new, state.count >= first), state

    def update_after(blocks: Any, state: EigenbasisState, params: Any) -> tuple[Any, Any]:
        is_first = state.count == 1
        state = when(is_first, lambda s: moved(EighBasis(descending=True), blocks, s), state)
        new, used = use(blocks, state, params)
        if skip_first:
            new, used = _skip(is_first, new, used, state)
        age = state.count - 1 if skip_first else state.count
        due = (age > 0) & (age % every == 0)
        used = when(due, lambda s: moved(basis, blocks, s), used)
        return _ready(new, ~is_first if skip_first else jnp.array(True)), used

    def update(blocks: Any, state: EigenbasisState, params: Any) -> tuple[Any, Any]:
        do = update_before if refresh == "before" else update_after
        new, after = do(blocks, state._replace(count=optax.safe_increment(state.count)), params)
        new = map_blocks(report_bases, new, state.bases, after.bases)
        return map_blocks(report_failures, new, after.failures), after

    return blocks_part(init, update)


def in_eigenbasis(
    inner: optax.GradientTransformation,
    *,
    first_moments: Sequence[str] | None = None,
    **options: Any,
) -> Part:
    """Runs any elementwise Optax transformation on raw gradients in the Kronecker eigenbasis.

    `optax.scale_by_adam` gives SOAP with first and second moment both in the rotating basis,
    `optax.scale_by_lion` an eigenbasis Lion, and so on. To be placed after `accumulate_factors`.

    Args:
      inner: Transformation whose state leaves have the shape of what it updates; factored ones
        (Adafactor) are refused.
      first_moments: Names of its state fields that are linear in the gradient: they are carried
        into the new basis at each refresh. None means `mu` and `trace`, where there are any.
      **options: As in `eigenbasis`.

    Returns:
      A part.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> tx = shampoo_jax.blocked(
      ...     optax.chain(
      ...         shampoo_jax.accumulate_factors(0.95),
      ...         shampoo_jax.in_eigenbasis(optax.scale_by_lion(), every=10, start=10),
      ...     )
      ... )
      >>> params = {"w": jnp.ones((3, 2))}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> updates["w"].shape
      (3, 2)
    """
    return eigenbasis(from_gradients(inner), first_moments=first_moments, **options)


def _move(
    blocks: Any,
    state: EigenbasisState,
    method: Basis,
    rtol: Any,
    first_moments: Sequence[str],
    reorder: bool,
) -> EigenbasisState:
    """The state in new bases."""
    new = map_blocks(lambda b, q: _refresh(b, q, method, rtol), blocks, state.bases)
    moves = map_blocks(lambda b, q, r: Move(q, r.bases, r.order), blocks, state.bases, new)
    return EigenbasisState(
        state.count,
        map_blocks(lambda b, r: r.bases, blocks, new),
        map_blocks(lambda b, old, r: r.keep if old else (), blocks, state.keep, new),
        map_blocks(lambda b, n, r: n + r.failed, blocks, state.failures, new),
        carry(state.inner, moves, first_moments, reorder),
    )


def rotate(b: Blocks, bases: Matrices) -> Blocks:
    """Gradient and update of a stack in the eigenbases."""
    gradient = apply_matrices(b.gradient, bases, transpose=True)
    update = apply_matrices(b.update, bases, transpose=True)
    return dataclasses.replace(b, gradient=gradient, update=update)


def rotate_back(done: Blocks, original: Blocks, bases: Matrices) -> Blocks:
    """The update of `done` in the parameter's own basis, with the original raw gradient."""
    return dataclasses.replace(
        done, gradient=original.gradient, update=apply_matrices(done.update, bases)
    )


def when(condition: Array | bool, f: Any, operand: Any) -> Any:
    """`f(operand)` if the condition holds, else the operand; no branch where it is known now."""
    if condition is True:
        return f(operand)
    return jax.lax.cond(condition, f, lambda same: same, operand)


def report_bases(
    b: Blocks, previous: Matrices, bases: Matrices, factors: Matrices | None = None
) -> Blocks:
    """Adds factors and bases, before and after this step, to the figures: a monitor reads them."""
    factors = b.per_dimension if factors is None else factors
    named = {"factor": factors, "previous": previous, "basis": bases}
    figures = {
        f"{name}/{k}": matrix
        for name, matrices in named.items()
        for k, matrix in enumerate(matrices)
        if matrix is not None
    }
    return dataclasses.replace(b, figures={**b.figures, **figures})


def report_failures(b: Blocks, failures: Array) -> Blocks:
    """Adds the count of failures to the figures."""
    return dataclasses.replace(b, figures={**b.figures, "failures": failures})


def _always(every: Any, first: Any) -> bool:
    return isinstance(every, int) and isinstance(first, int) and every == first == 1


def _keep_all(p: Blocks, exponents: Exponents) -> Matrices:
    return per_factor(lambda n, d, e: jnp.ones((n, d), bool), p.update.shape, exponents)


def _refresh(b: Blocks, old: Matrices, method: Basis, rtol: Any) -> Refreshed:
    """New bases of one stack; a factor that is not finite keeps its old one."""
    bases: list[Array | None] = list(old)
    keep: list[Array | None] = [None] * len(old)
    order: list[Array | None] = [None] * len(old)
    failed = jnp.zeros(len(b.update), bool)
    for k, (factor, q) in enumerate(zip(b.per_dimension, old, strict=True)):
        if factor is None or q is None:
            continue
        values, bases[k], columns, ok = new_basis(factor, q, method)
        failed |= ~ok
        keep[k] = eigh.truncated_power(values, 0.0, rtol=rtol) > 0
        if columns is not None:
            order[k] = where_block(
                ok, columns, jnp.broadcast_to(jnp.arange(q.shape[-1]), columns.shape)
            )
    return Refreshed(tuple(bases), tuple(keep), tuple(order), failed)


def new_basis(
    factor: Array, basis: Array, method: Basis
) -> tuple[Array, Array, Array | None, Array]:
    """A method's result for a stack of factors, with the old basis where one is not finite.

    Returns:
      Eigenvalues, bases, order of old columns as in `EighBasis`, and `bool[N]`: not refused.
    """
    ok = eigh.finite(factor)
    values, new, columns = method(where_block(ok, factor, jnp.zeros_like(factor)), basis)
    ok &= eigh.finite(new)
    return values, where_block(ok, new, basis), columns, ok


def _truncate(b: Blocks, keep: Matrices) -> Blocks:
    """Zero update along truncated directions."""
    update = b.update
    for k, mask in enumerate(keep):
        if mask is not None:
            shape = [len(mask), *[1] * (update.ndim - 1)]
            shape[k + 1] = mask.shape[1]
            update = update * mask.reshape(shape)
    return dataclasses.replace(b, update=update)


def _ready(blocks: Any, ready: Array) -> Any:
    return map_blocks(lambda b: dataclasses.replace(b, ready=ready), blocks)


def _skip(skipped: Array, new: Any, used: Any, state: Any) -> tuple[Any, Any]:
    """Zero updates and the old state where the step is skipped."""
    new = map_blocks(
        lambda b: dataclasses.replace(b, update=jnp.where(skipped, 0.0, b.update)), new
    )
    return new, jax.tree.map(lambda u, s: jnp.where(skipped, s, u), used, state)


class Move(NamedTuple):
    """A change of basis of one stack."""

    old: Matrices
    new: Matrices
    order: Matrices  # new order of old columns, or None per dimension


def carry(state: Any, moves: Any, first_moments: Sequence[str], reorder: bool) -> Any:
    """An inner state after a change of basis.

    Args:
      state: State of a transformation of stacks.
      moves: One `Move` per stack, in the tree of the stacks.
      first_moments: Names of the fields whose leaves are rotated by `Q_new^T Q_old`.
      reorder: Whether the other per-block leaves are permuted with the columns.

    Returns:
      The state of the same structure.
    """
    stacks = dict(jax.tree_util.tree_leaves_with_path(moves, is_leaf=lambda x: isinstance(x, Move)))

    def one(path: KeyPath, leaf: Array) -> Array:
        stack = stack_of(path, stacks) if jnp.ndim(leaf) else None
        if stack is None:
            return leaf
        move = stacks[stack]
        if _fields(path) & set(first_moments):
            moved = apply_matrices(apply_matrices(leaf, move.old), move.new, transpose=True)
            return moved.astype(leaf.dtype)
        return _permute(leaf, move.order) if reorder else leaf

    return jax.tree_util.tree_map_with_path(one, state)


def _permute(x: Array, order: Matrices) -> Array:
    """Each dimension k of a stack indexed by `order[k]`, `[N, d]`."""
    for k, columns in enumerate(order):
        if columns is not None:
            shape = [len(columns), *[1] * (x.ndim - 1)]
            shape[k + 1] = columns.shape[1]
            x = jnp.take_along_axis(x, columns.reshape(shape), axis=k + 1)
    return x


def _fields(path: KeyPath) -> set[str]:
    return {k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)}


def _per_block(state: Any, params: Any) -> list[tuple[KeyPath, Array, Blocks]]:
    """Every leaf of a state that is about blocks, with its path and its stack of parameters."""
    stacks = dict(jax.tree_util.tree_leaves_with_path(params, is_leaf=is_blocks))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    owned = [(path, leaf, stack_of(path, stacks)) for path, leaf in leaves if leaf.ndim]
    return [(path, leaf, stacks[stack]) for path, leaf, stack in owned if stack is not None]


def _check_refresh(every: Any, start: Any, refresh: str, skip_first: bool) -> None:
    """Raises ValueError for a schedule that makes no sense."""
    check_schedule(every, start)
    if refresh not in ("before", "after"):
        raise ValueError(f"refresh={refresh!r}: use 'before' or 'after'.")
    if start is not None and refresh == "after":
        raise ValueError(
            f"start={start} with refresh='after', whose first basis is that of the first gradient: "
            "drop start, or set refresh='before'."
        )
    if skip_first and refresh == "before":
        raise ValueError("skip_first=True needs refresh='after': set one or the other.")


def _check_elementwise(state: Any, params: Any) -> None:
    """Raises ValueError where a per-block state leaf does not have its block's shape."""
    for path, leaf, p in _per_block(state, params):
        if leaf.shape != p.update.shape:
            raise ValueError(
                f"the inner transformation keeps {jax.tree_util.keystr(path)} of shape "
                f"{leaf.shape} for blocks of shape {p.update.shape}: only elementwise "
                "transformations can run in an eigenbasis, factored ones cannot."
            )


def _check_named(state: Any, params: Any, first_moments: Sequence[str]) -> None:
    """Raises ValueError where a name is no field of the per-block state."""
    if not jax.tree.leaves(params):
        return
    found = set().union(*(_fields(path) for path, _, _ in _per_block(state, params)))
    unknown = [name for name in first_moments if name not in found]
    if unknown:
        raise ValueError(
            f"first_moments names {unknown[0]!r}, which the inner transformation does not keep; it "
            f"keeps {sorted(found)}: name fields as a tuple of strings, or leave first_moments out."
        )
