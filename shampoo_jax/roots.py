"""Inverse roots of the factors, when they are recomputed, and their application."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.blocks import Blocks, Part, blocks_part, map_blocks, where_block
from shampoo_jax.exponents import Exponents, default_exponents
from shampoo_jax.solvers import Solver, TruncatedEigh, identities

Array = jax.Array


class InvertRootsState(NamedTuple):
    """State of `invert_roots`."""

    count: Array  # int32[], steps taken
    roots: Any  # per stack a tuple over dimensions of [N, d, d] or None
    solver: Any  # per stack a tuple over dimensions of what the solver carries
    failures: Any  # per stack int32[N], refreshes so far that kept an old root


def refresh_due(count: Array, every: int | Array, start: int | Array) -> Array:
    """Whether step `count` (1-based) recomputes: at `start`, then at every multiple of `every`.

    With `every=3, start=4` these are the steps 4, 6, 9, 12.
    """
    return (count == start) | ((count % every == 0) & (count > start))


def invert_roots(
    solver: Solver | None = None,
    *,
    exponents: Exponents = default_exponents,
    every: int | Array = 1,
    start: int | Array | None = None,
) -> Part:
    """Replaces factors by their inverse roots `S_k^(-e_k)`, recomputed on a schedule.

    Before step `start` the roots are the solver's `init_root`, identities but for `CarriedBasis`,
    and the stacks are marked as not ready. A root whose solver reports failure keeps its last good
    value and is counted.

    Args:
      solver: See `Solver`; None means `TruncatedEigh()`.
      exponents: `e_k` by block order; Shampoo's `1 / (2 * order)` by default.
      every: Steps between refreshes, at least 1.
      start: First step that refreshes; None means `every`.

    Returns:
      A part. Its state holds `[N, d, d]` for each preconditioned dimension of each stack.

    Raises:
      ValueError: `every` below 1 or `start` below `every`.
    """
    check_schedule(every, start)
    solve = solver or TruncatedEigh()
    first = every if start is None else start

    def init(params: Any) -> InvertRootsState:
        return InvertRootsState(
            jnp.zeros([], jnp.int32),
            map_blocks(lambda p: _first_roots(p, exponents, solve), params),
            map_blocks(lambda p: _solver_states(p, exponents, solve), params),
            map_blocks(no_failures, params),
        )

    def update(blocks: Any, state: InvertRootsState, params: Any) -> tuple[Any, Any]:
        del params
        count = optax.safe_increment(state.count)

        def refresh(old: InvertRootsState) -> InvertRootsState:
            new = map_blocks(
                lambda b, *o: _refresh(b, solve, exponents(b.order), *o), blocks, *old[1:]
            )
            parts = [map_blocks(lambda b, p, i=i: p[i], blocks, new) for i in range(3)]
            return InvertRootsState(count, *parts)

        state = state._replace(count=count)
        if isinstance(every, int) and every == 1 and first == 1:
            state = refresh(state)
        else:
            due = refresh_due(count, every, first)
            state = jax.lax.cond(due, refresh, lambda same: same, state)
        new = map_blocks(
            lambda b, r, f: dataclasses.replace(
                b,
                matrices=r,
                ready=count >= first,
                figures={**b.figures, **report_factors(b), "failures": f},
            ),
            blocks,
            state.roots,
            state.failures,
        )
        return new, state

    return blocks_part(init, update)


def report_factors(b: Blocks) -> dict[str, Array]:
    """The factors of a stack as figures `"factor/k"`: a monitor stands where they are gone."""
    return {f"factor/{k}": s for k, s in enumerate(b.matrices) if s is not None}


def check_schedule(every: Any, start: Any) -> None:
    """Raises ValueError where a refresh interval or first step known now makes no sense."""
    if isinstance(every, int) and every < 1:
        raise ValueError(f"every={every} must be at least 1 step.")
    if isinstance(start, int) and isinstance(every, int) and start < every:
        raise ValueError(
            f"start={start} must not be below every={every}: the first refresh is at step start."
        )


def identity_roots(p: Blocks, exponents: Exponents) -> tuple[Array | None, ...]:
    """Identity matrices `[N, d, d]` for every dimension of a stack with a non-zero exponent."""
    n, *shape = p.update.shape
    return tuple(
        identities(n, d, p.update.dtype) if e else None
        for d, e in zip(shape, exponents(len(shape)), strict=True)
    )


def no_failures(p: Blocks) -> Array:
    """A count per block of a stack, `int32[N]`."""
    return jnp.zeros(len(p.update), jnp.int32)


def _first_roots(p: Blocks, exponents: Exponents, solve: Solver) -> tuple[Array | None, ...]:
    n, *shape = p.update.shape
    return tuple(
        solve.init_root(n, d, p.update.dtype, e) if e else None
        for d, e in zip(shape, exponents(len(shape)), strict=True)
    )


def _solver_states(p: Blocks, exponents: Exponents, solve: Solver) -> tuple[Any, ...]:
    n, *shape = p.update.shape
    return tuple(
        solve.init(n, d, p.update.dtype) if e else None
        for d, e in zip(shape, exponents(len(shape)), strict=True)
    )


def _refresh(
    b: Blocks,
    solve: Solver,
    exponents: tuple[float, ...],
    roots: tuple[Array | None, ...],
    carried: tuple[Any, ...],
    failures: Array,
) -> tuple[tuple[Array | None, ...], tuple[Any, ...], Array]:
    """New roots of one stack; a failed one keeps its old value and its block counts one failure."""
    new_roots, new_carried = list(roots), list(carried)
    failed = jnp.zeros(failures.shape, bool)
    for k, (factor, exponent) in enumerate(zip(b.per_dimension, exponents, strict=True)):
        if factor is None:
            continue
        root, ok, state = solve(factor, exponent, carried[k])
        keep = functools.partial(where_block, ok)
        new_roots[k], new_carried[k] = jax.tree.map(keep, (root, state), (roots[k], carried[k]))
        failed |= ~ok
    return tuple(new_roots), tuple(new_carried), failures + failed


def apply_matrices(
    x: Array, matrices: tuple[Array | None, ...], *, transpose: bool = False
) -> Array:
    """Multiplies each dimension k of a stack by its matrix: `x x_1 P_1 x_2 P_2 ...`.

    Args:
      x: Stack `[N, *block]`.
      matrices: `[N, d, d]` or None (identity) per dimension; empty for all identities.
      transpose: Whether to multiply by the transposes, as in a change into an eigenbasis.

    Returns:
      `[N, *block]`.
    """
    for k, matrix in enumerate(matrices):
        if matrix is None:
            continue
        rows = jnp.moveaxis(x, k + 1, 1)
        flat = rows.reshape(*rows.shape[:2], -1)
        left = matrix.swapaxes(1, 2) if transpose else matrix
        flat = jnp.matmul(left, flat, precision=jax.lax.Precision.HIGHEST)
        x = jnp.moveaxis(flat.reshape(rows.shape), 1, k + 1)
    return x


def precondition() -> Part:
    """Multiplies the update by the matrix of each dimension: `L^(-1/4) M R^(-1/4)` for matrices.

    Returns:
      A stateless part.
    """

    def update(blocks: Any, state: Any, params: Any) -> tuple[Any, Any]:
        del params
        new = map_blocks(
            lambda b: dataclasses.replace(b, update=apply_matrices(b.update, b.matrices)), blocks
        )
        return new, state

    return blocks_part(lambda params: optax.EmptyState(), update)
