"""Running other transformations in the Kronecker eigenbasis of the factors: SOAP and relatives."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import is_off
from shampoo_jax.base.paths import stack_of
from shampoo_jax.blocks.blocks import (
    Blocks,
    Matrices,
    Part,
    Stacks,
    Unread,
    along,
    each,
    each_of,
    make_part,
    where_block,
)
from shampoo_jax.matrix import eigh
from shampoo_jax.matrix.products import apply_matrices
from shampoo_jax.parts.change_of_basis import Move, carry, check_elementwise, check_named
from shampoo_jax.parts.lift import from_gradients
from shampoo_jax.parts.refresh import (
    BasisRefresh,
    check_schedule,
    in_chunks,
    refresh_slots,
    scheduled,
)
from shampoo_jax.parts.roots import no_failures
from shampoo_jax.solvers.bases import Basis, EighBasis, reorders
from shampoo_jax.solvers.solver import identities

Array = jax.Array
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
    columns: Matrices
    failed: Array  # bool[N], whether the block kept an old basis


def eigenbasis(
    inner: optax.GradientTransformation,
    *,
    basis: Basis | None = None,
    every: int | Array = 1,
    refresh: BasisRefresh | None = None,
    rtol: float | None = 0.0,
    first_moments: Sequence[str] | None = None,
) -> Part:
    """Rotates gradient and update into the eigenbases of the factors, runs `inner`, rotates back.

    With `Q_k` the eigenbasis of factor k, `inner` sees `G x_1 Q_1^T x_2 Q_2^T ...`; for a matrix
    that is `Ql^T G Qr`. With `scale_by_second_moment` inside this is SOAP (Vyas et al. 2024,
    arXiv:2409.11321), alias eigenvalue-corrected Shampoo.

    Parameters are rotated like the update, so decay inside `inner` is decay of the parameters. When
    bases change, state leaves of `inner` named in `first_moments` are carried along,
    `m <- m x_k Q_new^T Q_old`, so they go on describing the same tensor; all other leaves stay, or
    are permuted with the columns if `refresh.reorder`. Dimensions of exponent 0 are not rotated;
    the values of the others do not matter.

    Args:
      inner: Part of stacks; its per-block state must have the blocks' shape.
      basis: How bases are refreshed; None means `EighBasis()`.
      every: Steps between refreshes.
      refresh: When bases are refreshed, and what happens in the first step; None means Meta's
        `BasisRefresh(when="before", skip_first=False)`.
      rtol: Directions whose eigenvalue is at most `rtol` times the largest get a zero update; 0.0
        truncates nothing, None means `d * eps` of the dtype.
      first_moments: Names of state fields that are linear in the gradient; None means `mu` and
        `trace`, where there are any.

    Returns:
      A part; it reads `Blocks.matrices` as factors.

    Raises:
      ValueError: A schedule that makes no sense, `reorder` with a basis that does not tell how it
        sorts; at init an inner transformation whose state does not have the blocks' shape (factored
        second moments), or a given first moment that it does not have.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> second_moment = shampoo_jax.scale_by_second_moment(0.9)
      >>> factors = shampoo_jax.accumulate_factors(0.9)
      >>> tx = shampoo_jax.blocked(optax.chain(factors, shampoo_jax.eigenbasis(second_moment)))
      >>> gradient = {"w": jnp.array([[0.0, 3.0], [1.0, 0.0]])}
      >>> updates, state = tx.update(gradient, tx.init(gradient))
      >>> updates["w"].round(2).tolist()  # U V^T of the gradient's singular vectors
      [[0.0, 1.0], [1.0, 0.0]]
    """
    basis = EighBasis() if basis is None else basis
    when = BasisRefresh(when="before", skip_first=False) if refresh is None else refresh
    first = check_schedule(every, when)
    first = first if when.when == "before" else 1 + when.skip_first
    moving = _Moving(
        *(basis, every, rtol, FIRST_MOMENTS if first_moments is None else first_moments),
        *(_reorders(basis, when), when.chunk),
    )
    tx = optax.with_extra_args_support(inner)
    truncated = not is_off(rtol)

    def init(params: Stacks) -> EigenbasisState:
        state = tx.init(params)
        check_elementwise(state, params)
        check_named(state, params, first_moments or ())
        bases = each(identity_bases, params)
        keep = each(lambda p: _keep_all(p) if truncated else (), params)
        failures = each(no_failures, params)
        return EigenbasisState(jnp.zeros([], jnp.int32), bases, keep, failures, state)

    def update(
        stacks: Stacks, old: EigenbasisState, params: Any, **extra: Any
    ) -> tuple[Stacks, EigenbasisState]:
        count = optax.safe_increment(old.count)
        state = old._replace(count=count)
        renew = functools.partial(_renew, stacks, moving)
        if when.when == "before":
            state = scheduled(renew, count, every, first, when.stagger, state)
        else:
            begin = functools.partial(
                _renew, stacks, moving._replace(basis=EighBasis(descending=True)), None
            )
            state = _when(count == 1, begin, state)
        new, used = _use(tx, stacks, state, params, extra)
        if when.skip_first:
            new, used = _skip(count == 1, new, used, state)
        if when.when == "after":
            age = count - when.skip_first
            due = (age > 0) & (when.stagger | (age % every == 0))
            turn = age if when.stagger and every != 1 else None
            used = _when(due, functools.partial(renew, turn), used)
        report = functools.partial(_report, ready=count >= first)
        return each(report, new, old.bases, used.bases, used.failures), used

    return make_part(init, update)


class _Moving(NamedTuple):
    """How bases and what lives in them change."""

    basis: Basis
    every: Any
    rtol: Any
    first_moments: Sequence[str]
    reorder: bool
    chunk: int | None


def _reorders(basis: Basis, refresh: BasisRefresh) -> bool:
    if refresh.reorder and not reorders(basis):
        raise ValueError(
            f"reorder=True with basis={basis}, which does not tell how it orders columns: use "
            "QRBasis(sort='before'), or leave reorder out."
        )
    return reorders(basis) if refresh.reorder is None else refresh.reorder


def in_eigenbasis(
    inner: optax.GradientTransformation,
    *,
    basis: Basis | None = None,
    every: int | Array = 1,
    refresh: BasisRefresh | None = None,
    rtol: float | None = 0.0,
    first_moments: Sequence[str] | None = None,
) -> Part:
    """Runs any elementwise Optax transformation on raw gradients in the Kronecker eigenbasis.

    `optax.scale_by_adam` gives SOAP with first and second moment both in the rotating basis,
    `optax.scale_by_lion` an eigenbasis Lion, and so on. To be placed after `accumulate_factors`.

    Args:
      inner: Transformation whose state leaves have the shape of what it updates; factored ones
        (Adafactor) are refused.
      basis: How bases are refreshed; None means `EighBasis()`.
      every: Steps between refreshes.
      refresh: When bases are refreshed, as in `eigenbasis`.
      rtol: Truncation of null directions, as in `eigenbasis`.
      first_moments: Names of its state fields that are linear in the gradient: they are carried
        into the new basis at each refresh. None means `mu` and `trace`, where there are any.

    Returns:
      A part.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> tx = shampoo_jax.blocked(
      ...     optax.chain(
      ...         shampoo_jax.accumulate_factors(0.95),
      ...         shampoo_jax.in_eigenbasis(optax.scale_by_lion(), every=10),
      ...     )
      ... )
      >>> params = {"w": jnp.ones((3, 2))}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> updates["w"].shape
      (3, 2)
    """
    return eigenbasis(
        from_gradients(inner),
        basis=basis,
        every=every,
        refresh=refresh,
        rtol=rtol,
        first_moments=first_moments,
    )


def _renew(
    stacks: Stacks, moving: _Moving, turn: Array | None, state: EigenbasisState
) -> EigenbasisState:
    """The state in new bases, of the slots whose turn it is or of all."""
    paths = [(jax.tree_util.DictKey(key),) for key in stacks]
    leaves, structure = jax.tree_util.tree_flatten_with_path(state.inner)
    inner = [leaf for _, leaf in leaves]
    owned: dict[str, list[int]] = {key: [] for key in stacks}
    for i, (path, leaf) in enumerate(leaves):
        owner = stack_of(path, paths) if jnp.ndim(leaf) else None
        if owner is not None:
            owned[owner[0].key].append(i)

    def one(b: Blocks, own: list[int], *old: Any) -> tuple[Matrices, Matrices, Array]:
        def renew(old: Any, factors: Matrices) -> Any:
            bases, keep, failures, kept = old
            new = _refresh(factors, bases, keep, moving)
            move = Move(bases, new.bases, new.columns)
            carried = [
                carry(leaves[i][0], leaf, move, moving.first_moments, moving.reorder)
                for i, leaf in zip(own, kept, strict=True)
            ]
            return new.bases, new.keep, failures + new.failed, carried

        before = (*old, [inner[i] for i in own])
        if turn is None:
            *new, carried = renew(before, b.per_dimension)
        else:
            *new, carried = refresh_slots(
                renew, b.index, turn, moving.every, before, b.per_dimension
            )
        for i, leaf in zip(own, carried, strict=True):
            inner[i] = leaf
        return tuple(new)

    new = each_of(3, one, stacks, owned, state.bases, state.keep, state.failures)
    return EigenbasisState(state.count, *new, jax.tree.unflatten(structure, inner))


def _use(
    inner: optax.GradientTransformationExtraArgs,
    stacks: Stacks,
    state: EigenbasisState,
    params: Any,
    extra: dict[str, Any],
) -> tuple[Stacks, EigenbasisState]:
    """One step of `inner` in the bases."""
    rotated = each(_rotate, stacks, state.bases)
    weights = params
    if params is not None and not isinstance(params, Unread):
        # Weight decay inside adds parameters to the update, which is rotated back.
        weights = each(_rotate, params, state.bases)
    done, inner_state = inner.update(rotated, state.inner, weights, **extra)
    done = each(_truncate, done, state.keep)
    new = each(_rotate_back, done, stacks, state.bases)
    return new, state._replace(inner=inner_state)


def _rotate(b: Blocks, bases: Matrices) -> Blocks:
    """Gradient and update of a stack in the eigenbases."""
    gradient = apply_matrices(b.gradient, bases, transpose=True)
    update = apply_matrices(b.update, bases, transpose=True)
    return dataclasses.replace(b, gradient=gradient, update=update)


def _rotate_back(done: Blocks, original: Blocks, bases: Matrices) -> Blocks:
    """The update of `done` in the parameter's own basis, with the original raw gradient."""
    return dataclasses.replace(
        done, gradient=original.gradient, update=apply_matrices(done.update, bases)
    )


def _when(condition: Array, f: Any, operand: Any) -> Any:
    """`f(operand)` if the condition holds, else the operand."""
    return jax.lax.cond(condition, f, lambda same: same, operand)


def _report(b: Blocks, old: Matrices, new: Matrices, failures: Array, ready: Array) -> Blocks:
    """Says whether bases are in use, and adds figures for a monitor."""
    named = {"factor": b.per_dimension, "previous": old, "basis": new}
    figures = {
        f"{name}/{k}": matrix
        for name, matrices in named.items()
        for k, matrix in enumerate(matrices)
        if matrix is not None
    }
    return dataclasses.replace(
        b, ready=ready, figures={**b.figures, **figures, "failures": failures}
    )


def identity_bases(p: Blocks) -> Matrices:
    """Identity matrices `[N, d, d]` for every dimension of a stack with a non-zero exponent."""
    return p.per_factor(lambda n, d, e: identities(n, d, p.update.dtype))


def _keep_all(p: Blocks) -> Matrices:
    return p.per_factor(lambda n, d, e: jnp.ones((n, d), bool))


def _refresh(factors: Matrices, bases: Matrices, keep: Matrices, moving: _Moving) -> Refreshed:
    """New bases of one stack; a factor that is not finite keeps its old one, and what it keeps."""
    new, new_keep = list(bases), list(keep)
    columns: list[Array | None] = [None] * len(bases)
    failed = jnp.array(False)
    for k, (factor, basis) in enumerate(zip(factors, bases, strict=True)):
        if factor is None or basis is None:
            continue
        ok = eigh.finite(factor)
        safe = where_block(ok, factor, jnp.zeros_like(factor))
        values, found, moved = in_chunks(moving.basis, moving.chunk, safe, basis)
        ok &= eigh.finite(found)
        failed |= ~ok
        new[k] = where_block(ok, found, basis)
        old_keep = keep[k] if keep else None
        if old_keep is not None:
            kept = eigh.truncated_power(values, 0.0, rtol=moving.rtol) > 0
            new_keep[k] = where_block(ok, kept, old_keep)
        if moved is not None:
            same = jnp.broadcast_to(jnp.arange(basis.shape[-1]), moved.shape)
            columns[k] = where_block(ok, moved, same)
    return Refreshed(tuple(new), tuple(new_keep), tuple(columns), failed)


def _truncate(b: Blocks, keep: Matrices) -> Blocks:
    """Zero update along truncated directions."""
    update = b.update
    for k, mask in enumerate(keep):
        if mask is not None:
            update = update * along(mask, k, update.ndim)
    return dataclasses.replace(b, update=update)


def _skip(skipped: Array, new: Stacks, used: Any, state: Any) -> tuple[Stacks, Any]:
    """Zero updates and the old state where the step is skipped."""
    new = each(lambda b: dataclasses.replace(b, update=jnp.where(skipped, 0.0, b.update)), new)
    return new, jax.tree.map(lambda u, s: jnp.where(skipped, s, u), used, state)
