"""Running other transformations in the Kronecker eigenbasis of the factors: SOAP and relatives."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import check_kind, check_options, is_off, refuse
from shampoo_jax.base.paths import KeyPath
from shampoo_jax.blocks.blocks import (
    Blocks,
    Matrices,
    Part,
    Stacks,
    along,
    each,
    is_stacks,
    make_part,
    where_block,
)
from shampoo_jax.matrix import eigh, qr
from shampoo_jax.matrix.products import apply_matrices
from shampoo_jax.parts.change_of_basis import Move, carry, check_inner, per_stack
from shampoo_jax.parts.lift import from_gradients
from shampoo_jax.parts.refresh import BasisRefresh, Schedule, make_schedule, when
from shampoo_jax.parts.roots import no_failures
from shampoo_jax.solvers.bases import Basis, EighBasis, ascends, make_basis, reorders
from shampoo_jax.solvers.solver import identities

Array = jax.Array
Old = tuple[Any, Any, Array, Any]  # bases, what they keep, failures, leaves that live in them
FIRST_MOMENTS = ("mu", "trace")  # fields of stock and own transformations, linear in the gradient


class EigenbasisState(NamedTuple):
    """State of `eigenbasis`."""

    count: Array  # int32[], steps taken
    bases: Any  # per stack a tuple over dimensions of orthogonal [N, d, d] or None
    keep: Any  # per stack a tuple over dimensions of bool [N, d] or None: not truncated
    failures: Any  # per stack int32[N], refreshes so far that kept an old basis
    inner: Any


Step = tuple[Stacks, EigenbasisState]


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

    A factor of low rank, of a tall block or in the first steps, has a null space in which rounding
    alone chooses the basis. What new gradients have there is divided by second moments in that
    basis, so that gradients changed in their last bit change updates altogether. The authors' code
    of SOAP and KL-Shampoo does nothing about it, nor does this with `rtol=0.0`. With any other
    `rtol` such directions are left out of updates, and their basis is completed by fixed vectors
    (`matrix.qr.completed`, one more QR decomposition a refresh): updates then depend on gradients
    as smoothly as the eigenvectors above the cutoff do.

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
    check_options({"inner": inner, "rtol": rtol, "every": every})
    basis = EighBasis() if basis is None else make_basis(basis)
    check_kind("refresh", refresh, BasisRefresh, "BasisRefresh(stagger=True)")
    refresh = BasisRefresh(when="before", skip_first=False) if refresh is None else refresh
    schedule = make_schedule(every, refresh)
    first = schedule.start if refresh.when == "before" else 1 + refresh.skip_first
    moving = _Moving(basis, schedule, rtol, _names(first_moments), _reorders(basis, refresh))
    tx = optax.with_extra_args_support(inner)

    def init(params: Stacks) -> EigenbasisState:
        state = tx.init(params)
        check_inner(state, params, first_moments or ())
        bases = each(_identities, params)
        keep = each(lambda p: () if is_off(rtol) else _keep_all(p), params)
        failures = each(no_failures, params)
        return EigenbasisState(jnp.zeros([], jnp.int32), bases, keep, failures, state)

    def update(stacks: Stacks, old: EigenbasisState, params: Any, **extra: Any) -> Step:
        count = optax.safe_increment(old.count)
        state, renew = old._replace(count=count), functools.partial(_renew, stacks, moving)
        if refresh.when == "before":
            state = schedule.run(renew, count, state)
        else:
            # In the order of later ones, or second moments would meet the columns in reverse.
            beginning = moving._replace(basis=EighBasis(descending=not ascends(basis)))
            state = when(count == 1, functools.partial(_renew, stacks, beginning, None), state)
        new, used = _use(tx, stacks, state, params, extra)
        if refresh.skip_first:
            new, used = _skip(count == 1, new, used, state)
        if refresh.when == "after":
            used = _renew_after(renew, schedule, count - refresh.skip_first, used)
        report = functools.partial(_report, ready=count >= first)
        return each(report, new, old.bases, used.bases, used.failures), used

    return make_part(init, update)


def _names(first_moments: Sequence[str] | None) -> Sequence[str]:
    """Which fields of an inner state are rotated; refuses a single string, which has letters."""
    names = FIRST_MOMENTS if first_moments is None else first_moments
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        refuse("first_moments", names, ": give a tuple of names, such as ('mu',)")
    return names


class _Moving(NamedTuple):
    """How bases and what lives in them change."""

    basis: Basis
    schedule: Schedule
    rtol: Any
    first_moments: Sequence[str]
    reorder: bool


def _renew_after(renew: Any, schedule: Schedule, age: Array, state: EigenbasisState) -> Any:
    """Bases for the next gradient, after `age` steps that used some."""
    due = (age > 0) & (schedule.stagger | (age % schedule.every == 0))
    turn = age if schedule.stagger and schedule.every != 1 else None
    return when(due, functools.partial(renew, turn), state)


def _reorders(basis: Basis, refresh: BasisRefresh) -> bool:
    if refresh.reorder and not reorders(basis):
        raise ValueError(
            f"reorder=True with basis={basis}: only QRBasis(sort='before') tells how it sorts."
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
      refresh: When bases are refreshed, and what happens in the first step; None means Meta's
        `BasisRefresh(when="before", skip_first=False)`.
      rtol: Directions whose eigenvalue is at most `rtol` times the largest get a zero update; 0.0
        truncates nothing, None means `d * eps` of the dtype.
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
    options: Any = dict(basis=basis, every=every, refresh=refresh, rtol=rtol)
    return eigenbasis(from_gradients(inner), first_moments=first_moments, **options)


def _renew(stacks: Stacks, moving: _Moving, turn: Any, state: EigenbasisState) -> EigenbasisState:
    """The state in new bases, of the slots whose turn it is or of all."""
    new = state._replace(bases={}, keep={}, failures={})
    inner, replace = per_stack(state.inner, stacks)
    for key, b in stacks.items():
        paths, leaves = list(inner[key]), list(inner[key].values())
        old = state.bases[key], state.keep[key], state.failures[key], leaves
        refresh = functools.partial(_refresh, moving, paths)
        new.bases[key], new.keep[key], new.failures[key], leaves = moving.schedule.share(
            refresh, b.index, turn, old, b.per_dimension
        )
        inner[key] = dict(zip(paths, leaves, strict=True))
    return new._replace(inner=replace(inner))


def _refresh(moving: _Moving, paths: list[KeyPath], old: Old, factors: Matrices) -> Old:
    """New bases of some blocks of a stack, and what is kept in them carried along.

    A factor that is not finite keeps its old basis, and the directions that this keeps.
    """
    bases, keep, failures, inner = old
    new, new_keep, failed = list(bases), list(keep), jnp.array(False)
    columns: list[Array | None] = [None] * len(bases)
    for k, (factor, basis) in enumerate(zip(factors, bases, strict=True)):
        if factor is None or basis is None:
            continue
        # Waits for the dimension before it: temporary arrays of one of them are alive at a time.
        ok = eigh.finite(factor) & (failures + failed >= 0)
        sound = where_block(ok, factor, jnp.zeros_like(factor))
        known = keep[k] if keep else None
        values, found, moved = moving.basis(sound, basis, known, moving.rtol)
        kept = eigh.truncated_power(values, 0.0, rtol=moving.rtol) > 0
        if keep:
            found = qr.completed(found, kept)
        ok &= eigh.finite(found)
        failed |= ~ok
        new[k] = where_block(ok, found, basis)
        if keep:
            new_keep[k] = where_block(ok, kept, keep[k])
        if moving.reorder and moved is not None:
            columns[k] = where_block(ok, moved, jnp.arange(basis.shape[-1])[None])
    move = Move(bases, tuple(new), tuple(columns))
    follow = functools.partial(carry, move=move, first_moments=moving.first_moments)
    return tuple(new), tuple(new_keep), failures + failed, list(map(follow, paths, inner))


def _use(inner: Any, stacks: Stacks, state: EigenbasisState, params: Any, extra: Any) -> Step:
    """One step of `inner` in the bases."""
    rotated = each(_rotate, stacks, state.bases)
    # Weight decay inside adds parameters to the update, which is rotated back.
    weights = each(_rotate, params, state.bases) if is_stacks(params) else params
    done, inner_state = inner.update(rotated, state.inner, weights, **extra)
    new = each(_rotate_back, done, stacks, state.bases, state.keep)
    return new, state._replace(inner=inner_state)


def _rotate(b: Blocks, bases: Matrices) -> Blocks:
    """Gradient and update of a stack in the eigenbases."""
    into = functools.partial(apply_matrices, matrices=bases, transpose=True)
    return dataclasses.replace(b, gradient=into(b.gradient), update=into(b.update))


def _rotate_back(done: Blocks, original: Blocks, bases: Matrices, keep: Matrices) -> Blocks:
    """The update without truncated directions rotated back, and the gradient that it is of."""
    update = done.update
    for k, mask in enumerate(keep):
        if mask is not None:
            update = update * along(mask, k, update.ndim)
    update = apply_matrices(update, bases)
    return dataclasses.replace(done, gradient=original.gradient, update=update)


def _report(b: Blocks, old: Matrices, new: Matrices, failures: Array, ready: Array) -> Blocks:
    """Says whether bases are in use, and adds figures for a monitor."""
    figures: dict[str, Any] = {**b.figures, "failures": failures}
    for k, factor in enumerate(b.per_dimension):
        if factor is not None:
            figures |= {f"factor/{k}": factor, f"previous/{k}": old[k], f"basis/{k}": new[k]}
    return dataclasses.replace(b, ready=ready, figures=figures)


def _identities(p: Blocks) -> Matrices:
    return p.per_factor(lambda n, d, e: identities(n, d, p.update.dtype))


def _keep_all(p: Blocks) -> Matrices:
    return p.per_factor(lambda n, d, e: jnp.ones((n, d), bool))


def _skip(skipped: Array, new: Stacks, used: EigenbasisState, state: EigenbasisState) -> Step:
    """Zero updates and the old state where the step is skipped."""
    new = each(lambda b: dataclasses.replace(b, update=jnp.where(skipped, 0.0, b.update)), new)
    return new, jax.tree.map(lambda u, s: jnp.where(skipped, s, u), used, state)
