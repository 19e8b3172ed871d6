"""Inverse roots of the factors, when they are recomputed, and their application."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import check_dtype
from shampoo_jax.blocks.blocks import (
    Blocks,
    Matrices,
    Part,
    Stacks,
    each,
    each_of,
    make_part,
    stateless,
    where_block,
)
from shampoo_jax.matrix.products import apply_matrices
from shampoo_jax.parts.refresh import Refresh, check_schedule, in_chunks, refresh_slots, scheduled
from shampoo_jax.solvers.eigh import TruncatedEigh
from shampoo_jax.solvers.solver import Solver

Array = jax.Array
Old = tuple[Any, Any, Array]  # roots, what the solver carries, failures


class InvertRootsState(NamedTuple):
    """State of `invert_roots`."""

    count: Array  # int32[], steps taken
    roots: Any  # per stack a tuple over dimensions of [N, d, d] or None
    solver: Any  # per stack a tuple over dimensions of what the solver carries
    failures: Any  # per stack int32[N], refreshes so far that kept an old root


def invert_roots(
    solver: Solver | None = None,
    *,
    every: int | Array = 1,
    refresh: Refresh | None = None,
    root_dtype: Any = None,
) -> Part:
    """Replaces factors by their inverse roots `S_k^(-e_k)`, recomputed on a schedule.

    Before the first refresh the roots are the solver's `init_root`, identities but for
    `CarriedBasis`, and the stacks are marked as not ready. A root whose solver reports failure
    keeps its last good value and is counted. Exponents are those of `Blocks`.

    Args:
      solver: See `Solver`; None means `TruncatedEigh()`.
      every: Steps between refreshes, at least 1.
      refresh: First step that refreshes, and how refreshes are spread; None means `Refresh()`.
      root_dtype: Of the stored roots; None means that of the factors, which are never narrowed.

    Returns:
      A part. Its state holds `[N, d, d]` for each dimension of each stack whose exponent is not 0.

    Raises:
      ValueError: `every` below 1, a schedule that makes no sense, or a dtype that cannot hold
        roots; at init, exponents that the solver refuses.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> factors, roots = shampoo_jax.accumulate_factors(0.9), shampoo_jax.invert_roots(every=10)
      >>> tx = shampoo_jax.blocked(optax.chain(factors, roots, shampoo_jax.precondition()))
      >>> state = tx.init({"w": jnp.ones((3, 2))}).inner_state.inner
      >>> [root.shape for root in state[1].roots["3x2"]]
      [(1, 3, 3), (1, 2, 2)]
    """
    solve = TruncatedEigh() if solver is None else solver
    plan = Refresh() if refresh is None else refresh
    first = check_schedule(every, plan)
    check_dtype("root_dtype", root_dtype)
    always = isinstance(every, int) and isinstance(first, int) and every == first == 1

    def init(params: Stacks) -> InvertRootsState:
        roots = each(functools.partial(_first_roots, solve, root_dtype), params)
        carried = each(functools.partial(_first_carried, solve), params)
        return InvertRootsState(jnp.zeros([], jnp.int32), roots, carried, each(no_failures, params))

    def update(
        stacks: Stacks, state: InvertRootsState, params: Any, **extra: Any
    ) -> tuple[Stacks, InvertRootsState]:
        del params, extra
        count = optax.safe_increment(state.count)
        state = state._replace(count=count)
        renew = functools.partial(_renew, stacks, solve, every, plan.chunk)
        if always:
            state = renew(None, state)
        else:
            state = scheduled(renew, count, every, first, plan.stagger, state)
        report = functools.partial(_report, solve, count >= first)
        return each(report, stacks, state.roots, state.solver, state.failures), state

    return make_part(init, update)


def _first_roots(solve: Solver, root_dtype: Any, p: Blocks) -> Matrices:
    """Roots before the first refresh, in the dtype of storage."""
    try:
        for exponent in filter(None, p.exponents):
            solve.check(exponent)
    except ValueError as error:
        raise ValueError(f"blocks of shape {'x'.join(map(str, p.shape))}: {error}") from None
    dtype = p.update.dtype
    return p.per_factor(lambda n, d, e: solve.init_root(n, d, dtype, e).astype(root_dtype or dtype))


def _first_carried(solve: Solver, p: Blocks) -> tuple[Any, ...]:
    return p.per_factor(lambda n, d, e: solve.init(n, d, p.update.dtype))


def no_failures(p: Blocks) -> Array:
    """A count per block of a stack, `int32[N]`."""
    return jnp.zeros(len(p.update), jnp.int32)


def _renew(
    stacks: Stacks,
    solve: Solver,
    every: Any,
    chunk: int | None,
    turn: Array | None,
    old: InvertRootsState,
) -> InvertRootsState:
    """The state with new roots, of the slots whose turn it is or of all."""
    refresh = functools.partial(_refresh, solve, chunk)
    if turn is None:
        return InvertRootsState(old.count, *each_of(3, refresh, stacks, *old[1:]))

    def share(b: Blocks, *old: Any) -> Old:
        def some(old: Any, factors: Matrices) -> Old:
            return refresh(dataclasses.replace(b, matrices=factors), *old)

        return refresh_slots(some, b.index, turn, every, old, b.per_dimension)

    return InvertRootsState(old.count, *each_of(3, share, stacks, *old[1:]))


def _refresh(
    solve: Solver, chunk: int | None, b: Blocks, roots: Matrices, carried: Any, failures: Array
) -> Old:
    """New roots of one stack; a failed one keeps its old value and its block counts one failure."""
    new_roots, new_carried = list(roots), list(carried)
    failed = jnp.zeros(failures.shape, bool)
    for k, (factor, exponent) in enumerate(zip(b.per_dimension, b.exponents, strict=True)):
        if factor is None:
            continue
        if chunk is None:
            root, ok, state = solve(factor, exponent, carried[k])
        else:
            solved = lambda f, s, e=exponent: solve(f, e, s)  # noqa: E731
            root, ok, state = in_chunks(solved, chunk, factor, carried[k])
        keep = functools.partial(where_block, ok)
        old = (roots[k], carried[k])
        new_roots[k], new_carried[k] = jax.tree.map(keep, (root, state), old)
        failed |= ~ok
    return tuple(new_roots), tuple(new_carried), failures + failed


def _report(
    solve: Solver, ready: Array, b: Blocks, roots: Matrices, carried: Any, failures: Array
) -> Blocks:
    """Hands the roots on, with figures for a monitor, which stands where the factors are gone."""
    matrices, figures = list(roots), {**b.figures, "failures": failures}
    for k, root in enumerate(roots):
        if root is None:
            continue
        matrices[k] = root.astype(b.update.dtype)
        figures[f"factor/{k}"] = b.matrices[k]
        nothing = isinstance(carried[k], tuple) and not carried[k]
        for name, value in () if nothing else solve.figures(carried[k]).items():
            figures[name] = figures.get(name, 0) + value
    return dataclasses.replace(b, matrices=tuple(matrices), ready=ready, figures=figures)


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
    return stateless(_precondition)


def _precondition(b: Blocks) -> Blocks:
    return dataclasses.replace(b, update=apply_matrices(b.update, b.matrices))
