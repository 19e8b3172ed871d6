"""Inverse roots of the factors, when they are recomputed, and their application."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import check_options
from shampoo_jax.base.precision import check_dtype
from shampoo_jax.blocks.blocks import Blocks, Part, blocks_part, map_blocks, where_block
from shampoo_jax.blocks.exponents import Exponents, default_exponents, per_factor
from shampoo_jax.parts.refresh import check_schedule, in_chunks, refresh_slots, scheduled
from shampoo_jax.solvers.solver import Solver, TruncatedEigh, identities

Array = jax.Array


class InvertRootsState(NamedTuple):
    """State of `invert_roots`."""

    count: Array  # int32[], steps taken
    roots: Any  # per stack a tuple over dimensions of [N, d, d] or None
    solver: Any  # per stack a tuple over dimensions of what the solver carries
    failures: Any  # per stack int32[N], refreshes so far that kept an old root


def invert_roots(
    solver: Solver | None = None,
    *,
    exponents: Exponents = default_exponents,
    every: int | Array = 1,
    start: int | Array | None = None,
    stagger: bool = False,
    chunk: int | None = None,
    root_dtype: Any = None,
) -> Part:
    """Replaces factors by their inverse roots `S_k^(-e_k)`, recomputed on a schedule.

    Before step `start` the roots are the solver's `init_root`, identities but for `CarriedBasis`,
    and the stacks are marked as not ready. A root whose solver reports failure keeps its last good
    value and is counted.

    Args:
      solver: See `Solver`; None means `TruncatedEigh()`.
      exponents: `e_k` by block shape; Shampoo's `1 / (2 * order)` by default.
      every: Steps between refreshes, at least 1.
      start: First step that refreshes; None means `every`.
      stagger: Whether refreshes are spread over the steps: step `start` refreshes all blocks, each
        later one those whose index equals the step modulo `every`, so that all steps cost the same.
      chunk: Most factors of one shape that are solved at the same time, to bound working memory.
      root_dtype: Of the stored roots; None means that of the factors, which are never narrowed.

    Returns:
      A part. Its state holds `[N, d, d]` for each preconditioned dimension of each stack.

    Raises:
      ValueError: `every` below 1, `start` below `every`, `stagger` with a traced `every`, `chunk`
        below 1, or a dtype that cannot hold roots; at init, exponents that the solver refuses.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> factors, roots = shampoo_jax.accumulate_factors(0.9), shampoo_jax.invert_roots(every=10)
      >>> tx = shampoo_jax.blocked(optax.chain(factors, roots, shampoo_jax.precondition()))
      >>> state = tx.init({"w": jnp.ones((3, 2))})
      >>> [root.shape for root in state.inner[1].roots["3x2"]]
      [(1, 3, 3), (1, 2, 2)]
    """
    check_schedule(every, start, stagger)
    check_dtype("root_dtype", root_dtype)
    check_options({"chunk": chunk})
    solve = solver or TruncatedEigh()
    first = every if start is None else start

    def init(params: Any) -> InvertRootsState:
        def roots(p: Blocks) -> tuple[Array | None, ...]:
            _check_exponents(solve, p.update.shape[1:], exponents)
            make = functools.partial(_first_root, solve, p.update.dtype, root_dtype)
            return per_factor(make, p.update.shape, exponents)

        def carried(p: Blocks) -> tuple[Any, ...]:
            make = lambda n, d, e: solve.init(n, d, p.update.dtype)  # noqa: E731
            return per_factor(make, p.update.shape, exponents)

        return InvertRootsState(
            jnp.zeros([], jnp.int32),
            map_blocks(roots, params),
            map_blocks(carried, params),
            map_blocks(no_failures, params),
        )

    def refresh(blocks: Any, turn: Array | None, old: InvertRootsState) -> InvertRootsState:
        def stack(b: Blocks, *old: Any) -> tuple[Any, Any, Array]:
            def renew(old: Any, factors: Any) -> tuple[Any, Any, Array]:
                return _refresh(factors, solve, exponents(b.shape), chunk, old)

            return refresh_slots(renew, b.slots, turn, every, old, b.per_dimension, real=b.real)

        new = map_blocks(stack, blocks, *old[1:])
        parts = [map_blocks(lambda b, p, i=i: p[i], blocks, new) for i in range(3)]
        return InvertRootsState(old.count, *parts)

    def update(blocks: Any, state: InvertRootsState, params: Any) -> tuple[Any, Any]:
        del params
        count = optax.safe_increment(state.count)
        state = state._replace(count=count)
        renew = functools.partial(refresh, blocks)
        state = scheduled(renew, count, every, first, stagger, state)
        report = functools.partial(_report, solve, count >= first)
        return map_blocks(report, blocks, *state[1:]), state

    return blocks_part(init, update)


def _report(
    solve: Solver, ready: Array, b: Blocks, roots: Any, carried: Any, failures: Array
) -> Blocks:
    """Hands the roots on, with figures for a monitor."""
    own = [solve.figures(c) for c, r in zip(carried, roots, strict=True) if r is not None]
    total: Any = {name: sum(each[name] for each in own) for name in (own[0] if own else ())}
    return dataclasses.replace(
        b,
        matrices=tuple(None if r is None else r.astype(b.update.dtype) for r in roots),
        ready=ready,
        figures={**b.figures, **report_factors(b), **total, "failures": failures},
    )


def _check_exponents(solve: Solver, block: tuple[int, ...], exponents: Exponents) -> None:
    """Raises ValueError for blocks with an exponent that the solver refuses."""
    try:
        for exponent in filter(None, exponents(block)):
            solve.check(exponent)
    except ValueError as error:
        raise ValueError(f"blocks of shape {'x'.join(map(str, block))}: {error}") from None


def _first_root(solve: Solver, dtype: Any, stored: Any, n: int, d: int, exponent: float) -> Array:
    """Roots before the first refresh, in the dtype of storage."""
    return solve.init_root(n, d, dtype, exponent).astype(stored or dtype)


def report_factors(b: Blocks) -> dict[str, Array]:
    """The factors of a stack as figures `"factor/k"`: a monitor stands where they are gone."""
    return {f"factor/{k}": s for k, s in enumerate(b.matrices) if s is not None}


def identity_roots(p: Blocks, exponents: Exponents) -> tuple[Array | None, ...]:
    """Identity matrices `[N, d, d]` for every dimension of a stack with a non-zero exponent."""
    dtype = p.update.dtype
    return per_factor(lambda n, d, e: identities(n, d, dtype), p.update.shape, exponents)


def no_failures(p: Blocks) -> Array:
    """A count per block of a stack, `int32[N]`."""
    return jnp.zeros(len(p.update), jnp.int32)


def _refresh(
    factors: tuple[Array | None, ...],
    solve: Solver,
    exponents: tuple[float, ...],
    chunk: int | None,
    old: tuple[Any, Any, Array],
) -> tuple[Any, Any, Array]:
    """New roots of one stack; a failed one keeps its old value and its block counts one failure."""
    roots, carried, failures = list(old[0]), list(old[1]), old[2]
    failed = jnp.zeros(failures.shape, bool)
    for k, (factor, exponent) in enumerate(zip(factors, exponents, strict=True)):
        if factor is None:
            continue
        root, ok, state = in_chunks(
            lambda f, s, e=exponent: solve(f, e, s), chunk, factor, carried[k]
        )
        keep = functools.partial(where_block, ok)
        roots[k], carried[k] = jax.tree.map(keep, (root, state), (roots[k], carried[k]))
        failed |= ~ok
    return tuple(roots), tuple(carried), failures + failed


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

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> parts = (shampoo_jax.accumulate_factors(0.9), shampoo_jax.invert_roots(), precondition())
      >>> tx = shampoo_jax.blocked(optax.chain(*parts))
      >>> grads = {"w": jnp.array([[0.0, 3.0], [1.0, 0.0]])}
      >>> tx.update(grads, tx.init(grads))[0]["w"].round(2).tolist()  # U V^T of the gradient
      [[0.0, 1.0], [1.0, 0.0]]
    """

    def update(blocks: Any, state: Any, params: Any) -> tuple[Any, Any]:
        del params
        new = map_blocks(
            lambda b: dataclasses.replace(b, update=apply_matrices(b.update, b.matrices)), blocks
        )
        return new, state

    return blocks_part(lambda params: optax.EmptyState(), update)
