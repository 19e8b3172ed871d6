"""Inverse roots of the factors, when they are recomputed, and their application."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.blocks import Blocks, blocks_part, map_blocks
from shampoo_jax.factors import Exponents, default_exponents
from shampoo_jax.solvers import Solver, TruncatedEigh

Array = jax.Array


class InvertRootsState(NamedTuple):
    """State of `invert_roots`."""

    count: Array  # int32[], steps taken
    roots: Any  # per stack a tuple over dimensions of [N, d, d] or None
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
) -> optax.GradientTransformationExtraArgs:
    """Replaces factors by their inverse roots `S_k^(-e_k)`, recomputed on a schedule.

    Before step `start` the roots are identities and the stacks are marked as not ready. A root
    whose solver reports failure keeps its last good value and is counted.

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
        def identity(p: Blocks) -> tuple[Array | None, ...]:
            n, *shape = p.update.shape
            return tuple(
                jnp.broadcast_to(jnp.eye(d, dtype=p.update.dtype), (n, d, d)) if e else None
                for d, e in zip(shape, exponents(len(shape)), strict=True)
            )

        failures = map_blocks(lambda p: jnp.zeros(len(p.update), jnp.int32), params)
        return InvertRootsState(jnp.zeros([], jnp.int32), map_blocks(identity, params), failures)

    def update(blocks: Any, state: InvertRootsState, params: Any) -> tuple[Any, Any]:
        del params
        count = optax.safe_increment(state.count)

        def refresh(old: tuple[Any, Any]) -> tuple[Any, Any]:
            pairs = map_blocks(
                lambda b, *o: _refresh(b, *o, solve, exponents(b.order)), blocks, *old
            )
            return (
                map_blocks(lambda b, p: p[0], blocks, pairs),
                map_blocks(lambda b, p: p[1], blocks, pairs),
            )

        old = (state.roots, state.failures)
        if isinstance(every, int) and every == 1 and first == 1:
            roots, failures = refresh(old)
        else:
            due = refresh_due(count, every, first)
            roots, failures = jax.lax.cond(due, refresh, lambda same: same, old)
        new = map_blocks(
            lambda b, r, f: dataclasses.replace(
                b, matrices=r, ready=count >= first, figures={**b.figures, "failures": f}
            ),
            blocks,
            roots,
            failures,
        )
        return new, InvertRootsState(count, roots, failures)

    return blocks_part(init, update)


def check_schedule(every: Any, start: Any) -> None:
    """Raises ValueError where a refresh interval or first step known now makes no sense."""
    if isinstance(every, int) and every < 1:
        raise ValueError(f"every={every} must be at least 1 step.")
    if isinstance(start, int) and isinstance(every, int) and start < every:
        raise ValueError(
            f"start={start} must not be below every={every}: the first refresh is at step start."
        )


def _refresh(
    b: Blocks,
    old: tuple[Array | None, ...],
    failures: Array,
    solve: Solver,
    exponents: tuple[float, ...],
) -> tuple[tuple[Array | None, ...], Array]:
    """New roots of one stack; a failed one keeps its old value and its block counts one failure."""
    roots: list[Array | None] = []
    failed = jnp.zeros(failures.shape, bool)
    for factor, root, exponent in zip(b.matrices, old, exponents, strict=True):
        if factor is None or root is None:
            roots.append(None)
            continue
        new, ok = solve(factor, exponent)
        roots.append(jnp.where(ok[:, None, None], new, root).astype(root.dtype))
        failed |= ~ok
    return tuple(roots), failures + failed


def apply_matrices(x: Array, matrices: tuple[Array | None, ...], *, transpose: bool = False) -> Array:
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


def precondition() -> optax.GradientTransformationExtraArgs:
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
