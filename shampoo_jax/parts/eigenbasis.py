"""Running other transformations in the Kronecker eigenbasis of the factors: SOAP and relatives."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import is_off
from shampoo_jax.base.paths import KeyPath, stack_of
from shampoo_jax.blocks.blocks import (
    Blocks,
    Part,
    blocks_part,
    from_gradients,
    is_blocks,
    map_blocks,
    where_block,
)
from shampoo_jax.blocks.exponents import Exponents, default_exponents, per_factor
from shampoo_jax.matrix import eigh
from shampoo_jax.parts.change_of_basis import (
    Matrices,
    Move,
    along,
    carry,
    check_elementwise,
    check_named,
)
from shampoo_jax.parts.refresh import check_schedule, refresh_slots, scheduled
from shampoo_jax.parts.roots import apply_matrices, identity_roots, no_failures
from shampoo_jax.solvers.bases import Basis, EighBasis, reorders

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
    order: Matrices
    failed: Array  # bool[N], whether the block kept an old basis


def eigenbasis(
    inner: optax.GradientTransformation,
    *,
    basis: Basis | None = None,
    exponents: Exponents = default_exponents,
    every: int | Array = 1,
    start: int | Array | None = None,
    stagger: bool = False,
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
      stagger: Whether each step refreshes one block in `every`, see `invert_roots`, once all have
        had their first basis.
      refresh: `"before"` refreshes from factors that include this step's gradient, then uses the
        new basis (Meta). `"after"` decomposes the first step's factors and from then on uses the
        old basis, so that a gradient is never rotated by a basis that has seen it (the papers).
      skip_first: With `"after"`, whether the first step only fills factors and bases: its update
        is zero and `inner` does not see it.
      rtol: Directions whose eigenvalue is at most `rtol` times the largest get a zero update; 0.0
        truncates nothing, None means `d * eps` of the dtype.
      first_moments: Names of state fields that are linear in the gradient; None means `mu` and
        `trace`, where there are any.
      reorder: Whether the other leaves follow when `QRBasis(sort="before")` reorders columns.

    Returns:
      A part; it reads `Blocks.matrices` as factors.

    Raises:
      ValueError: A schedule that makes no sense, `start` or `skip_first` beside the other
        `refresh`, `reorder` with a basis that reports no order; at init an inner transformation
        whose state does not have the blocks' shape (factored second moments), or a given first
        moment that it does not have.

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
    _check_refresh(every, start, stagger, refresh, skip_first)
    basis = EighBasis() if basis is None else basis
    if reorder and not reorders(basis):
        raise ValueError(
            f"reorder=True with basis={basis}, which does not tell how it orders columns: use "
            "QRBasis(sort='before'), or set reorder=False."
        )
    before = refresh == "before"
    first = (every if start is None else start) if before else 1 + skip_first
    tx = optax.with_extra_args_support(inner)
    truncated = not is_off(rtol)
    names = FIRST_MOMENTS if first_moments is None else first_moments

    def init(params: Any) -> EigenbasisState:
        state = tx.init(params)
        check_elementwise(state, params)
        check_named(state, params, first_moments or ())
        bases = map_blocks(lambda p: identity_roots(p, exponents), params)
        keep = map_blocks(lambda p: _keep_all(p, exponents) if truncated else (), params)
        failures = map_blocks(no_failures, params)
        return EigenbasisState(jnp.zeros([], jnp.int32), bases, keep, failures, state)

    def update(blocks: Any, old: EigenbasisState, params: Any) -> tuple[Any, Any]:
        count = optax.safe_increment(old.count)
        is_first = count == 1
        move = functools.partial(
            _move, blocks, every=every, rtol=rtol, first_moments=names, reorder=reorder
        )
        state = old._replace(count=count)
        if before:
            renew = lambda turn, s: move(s, turn, method=basis)  # noqa: E731
            state = scheduled(renew, count, every, first, stagger, state)
        else:
            begin = functools.partial(move, method=EighBasis(descending=True))
            state = _when(is_first, begin, state)
        new, used = _use(tx, blocks, state, params)
        if skip_first:
            new, used = _skip(is_first, new, used, state)
        if not before:
            age = count - skip_first
            due = (age > 0) & (stagger | (age % every == 0))
            turn = age if stagger and every != 1 else None
            used = _when(due, functools.partial(move, turn=turn, method=basis), used)
        report = functools.partial(_report, ready=count >= first)
        return map_blocks(report, new, old.bases, used.bases, used.failures), used

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
    turn: Array | None = None,
    *,
    every: Any,
    method: Basis,
    rtol: Any,
    first_moments: Sequence[str],
    reorder: bool,
) -> EigenbasisState:
    """The state in new bases, of the slots whose turn it is or of all."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(blocks, is_leaf=is_blocks)]
    leaves, structure = jax.tree_util.tree_flatten_with_path(state.inner)
    owners = [stack_of(path, paths) if jnp.ndim(leaf) else None for path, leaf in leaves]
    inner = [leaf for _, leaf in leaves]

    def stack(path: KeyPath, b: Blocks, *old: Any) -> tuple[Matrices, Matrices, Array]:
        own = [i for i, owner in enumerate(owners) if owner == path]

        def renew(old: Any, factors: Matrices) -> Any:
            bases, keep, failures, kept = old
            new = _refresh(factors, bases, keep, method, rtol)
            move = Move(bases, new.bases, new.order)
            carried = [
                carry(leaves[i][0], leaf, move, first_moments, reorder)
                for i, leaf in zip(own, kept, strict=True)
            ]
            return new.bases, new.keep, failures + new.failed, carried

        before = (*old, [inner[i] for i in own])
        *new, carried = refresh_slots(
            renew, b.slots, turn, every, before, b.per_dimension, real=b.real
        )
        for i, leaf in zip(own, carried, strict=True):
            inner[i] = leaf
        return tuple(new)

    new = jax.tree_util.tree_map_with_path(
        stack, blocks, state.bases, state.keep, state.failures, is_leaf=is_blocks
    )
    bases, keep, failures = (map_blocks(lambda b, n, i=i: n[i], blocks, new) for i in range(3))
    carried = jax.tree.unflatten(structure, inner)
    return EigenbasisState(state.count, bases, keep, failures, carried)


def _use(
    inner: optax.GradientTransformationExtraArgs, blocks: Any, state: EigenbasisState, params: Any
) -> tuple[Any, EigenbasisState]:
    """One step of `inner` in the bases."""
    rotated = map_blocks(_rotate, blocks, state.bases)
    # Weight decay inside adds parameters to the update, which is rotated back.
    weights = None if params is None else map_blocks(_rotate, params, state.bases)
    done, inner_state = inner.update(rotated, state.inner, weights)
    done = map_blocks(_truncate, done, state.keep)
    new = map_blocks(_rotate_back, done, blocks, state.bases)
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


def _keep_all(p: Blocks, exponents: Exponents) -> Matrices:
    return per_factor(lambda n, d, e: jnp.ones((n, d), bool), p.update.shape, exponents)


def _refresh(
    factors: Matrices, bases: Matrices, keep: Matrices, method: Basis, rtol: Any
) -> Refreshed:
    """New bases of one stack; a factor that is not finite keeps its old one, and what it keeps."""
    new, new_keep = list(bases), list(keep)
    order: list[Array | None] = [None] * len(bases)
    failed = jnp.array(False)
    for k, (factor, basis) in enumerate(zip(factors, bases, strict=True)):
        if factor is None or basis is None:
            continue
        ok = eigh.finite(factor)
        values, columns, moved = method(where_block(ok, factor, jnp.zeros_like(factor)), basis)
        ok &= eigh.finite(columns)
        failed |= ~ok
        new[k] = where_block(ok, columns, basis)
        old_keep = keep[k] if keep else None
        if old_keep is not None:
            kept = eigh.truncated_power(values, 0.0, rtol=rtol) > 0
            new_keep[k] = where_block(ok, kept, old_keep)
        if moved is not None:
            order[k] = where_block(
                ok, moved, jnp.broadcast_to(jnp.arange(basis.shape[-1]), moved.shape)
            )
    return Refreshed(tuple(new), tuple(new_keep), tuple(order), failed)


def _truncate(b: Blocks, keep: Matrices) -> Blocks:
    """Zero update along truncated directions."""
    update = b.update
    for k, mask in enumerate(keep):
        if mask is not None:
            update = update * along(mask, k, update.ndim)
    return dataclasses.replace(b, update=update)


def _skip(skipped: Array, new: Any, used: Any, state: Any) -> tuple[Any, Any]:
    """Zero updates and the old state where the step is skipped."""
    new = map_blocks(
        lambda b: dataclasses.replace(b, update=jnp.where(skipped, 0.0, b.update)), new
    )
    return new, jax.tree.map(lambda u, s: jnp.where(skipped, s, u), used, state)


def _check_refresh(every: Any, start: Any, stagger: bool, refresh: str, skip_first: bool) -> None:
    """Raises ValueError for a schedule that makes no sense."""
    check_schedule(every, start, stagger)
    if refresh not in ("before", "after"):
        raise ValueError(f"refresh={refresh!r}: use 'before' or 'after'.")
    if start is not None and refresh == "after":
        raise ValueError(
            f"start={start} with refresh='after', whose first basis is that of the first gradient: "
            "drop start, or set refresh='before'."
        )
    if skip_first and refresh == "before":
        raise ValueError("skip_first=True needs refresh='after': set one or the other.")
