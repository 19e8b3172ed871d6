"""Inverse roots of the factors, when they are recomputed, and their application."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import check_kind
from shampoo_jax.base.storage import check_form, decode, encode
from shampoo_jax.blocks.blocks import (
    Blocks,
    Matrices,
    Part,
    Stacks,
    each,
    each_of,
    make_part,
    microbatches_of,
    stateless,
    where_block,
)
from shampoo_jax.matrix.products import apply_matrices
from shampoo_jax.parts.refresh import Refresh, Schedule, make_schedule
from shampoo_jax.solvers.eigh import TruncatedEigh
from shampoo_jax.solvers.registry import make_solver
from shampoo_jax.solvers.solver import Solver

Array = jax.Array
Old = tuple[Any, Any, Array]  # roots, what the solver carries, failures


class InvertRootsState(NamedTuple):
    """State of `invert_roots`."""

    count: Array  # int32[], steps taken
    roots: Any  # per stack a tuple over dimensions of [N, d, d] or None
    solver: Any  # per stack a tuple over dimensions of what the solver carries
    failures: Any  # per stack int32[N], refreshes so far that kept an old root


Step = tuple[Stacks, InvertRootsState]


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
      solver: How roots are computed, with its cutoffs or damping; None means `TruncatedEigh()`.
      every: Steps between refreshes, at least 1.
      refresh: First step that refreshes, and how refreshes are spread; None means `Refresh()`.
      root_dtype: Of the stored roots, or a form of one's own, see `scale_by_shampoo`; None means
        that of the factors, which are never narrowed.

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
    solve = TruncatedEigh() if solver is None else make_solver(solver)
    check_kind("refresh", refresh, Refresh, "Refresh(stagger=True)")
    schedule = make_schedule(every, refresh or Refresh())
    check_form("root_dtype", root_dtype)
    always = schedule.always

    def init(params: Stacks) -> InvertRootsState:
        roots, carried = each_of(2, functools.partial(_first, solve, root_dtype), params)
        return InvertRootsState(jnp.zeros([], jnp.int32), roots, carried, each(no_failures, params))

    def update(stacks: Stacks, state: InvertRootsState, params: Any, **extra: Any) -> Step:
        state = state._replace(count=optax.safe_increment(state.count))
        renew = functools.partial(_renew, stacks, solve, schedule)
        state = renew(None, state) if always else schedule.run(renew, state.count, state)
        report = functools.partial(_report, solve, state.count >= schedule.start)
        return each(report, stacks, state.roots, state.solver, state.failures), state

    return make_part(init, update)


def _first(solve: Solver, root_dtype: Any, p: Blocks) -> tuple[Matrices, Any]:
    """Roots before the first refresh, in the dtype of storage, and what the solver carries."""
    try:
        for exponent in filter(None, p.exponents):
            solve.check(exponent)
    except ValueError as error:
        raise ValueError(f"blocks of shape {'x'.join(map(str, p.shape))}: {error}") from None
    dtype = p.update.dtype
    roots = p.per_factor(lambda n, d, e: encode(solve.init_root(n, d, dtype, e), root_dtype))
    return roots, p.per_factor(lambda n, d, e: solve.init(n, d, dtype))


def decoded(roots: Any, dtype: Any) -> Matrices:
    """Stored roots of a stack in the dtype of the arithmetic."""
    return tuple(None if root is None else decode(root, dtype) for root in roots)


def no_failures(p: Blocks) -> Array:
    """A count per block of a stack, `int32[N]`."""
    return jnp.zeros(len(p.update), jnp.int32)


def _renew(
    stacks: Stacks, solve: Solver, schedule: Schedule, turn: Any, old: InvertRootsState
) -> InvertRootsState:
    """The state with new roots, of the slots whose turn it is or of all."""
    new = old._replace(roots={}, solver={}, failures={})
    for key, b in stacks.items():
        refresh = functools.partial(_refresh, solve, b.exponents)
        name = getattr(solve, "microbatches", None)
        reads = (b.per_dimension, None if name is None else _samples(solve, b, name))
        before = old.roots[key], old.solver[key], old.failures[key]
        if turn is not None or schedule.chunk is not None:
            refresh = functools.partial(schedule.share, refresh, b.index, turn)
        new.roots[key], new.solver[key], new.failures[key] = refresh(before, *reads)
    return new


def _samples(solve: Any, b: Blocks, name: str) -> Array:
    """Gradients of microbatches as they count in the factors, for a solver that asks for them."""
    x = microbatches_of(b, name, least=2)
    if b.weight is None:
        raise ValueError(
            f"solver={solve}: the statistics in front of it do not say with what weight the newest "
            "gradients count; use accumulate_factors, and damping of the solver's."
        )
    return x * jnp.sqrt(b.weight)


def _refresh(
    solve: Any, exponents: tuple[float, ...], old: Old, factors: Matrices, samples: Array | None
) -> Old:
    """New roots of some blocks of a stack; a failed one keeps its old value and is counted."""
    roots, carried, failures = old
    new_roots, new_carried = list(roots), list(carried)
    failed = jnp.zeros(failures.shape, bool)
    for k, (factor, exponent) in enumerate(zip(factors, exponents, strict=True)):
        if factor is None:
            continue
        noise = ()
        if samples is not None:
            rows = jnp.moveaxis(samples, k + 2, 2)
            noise = (rows.reshape(*rows.shape[:3], -1),)
        root, ok, state = solve(factor, exponent, carried[k], *noise)
        keep = functools.partial(where_block, ok)
        new = encode(root, roots[k]), state
        new_roots[k], new_carried[k] = jax.tree.map(keep, new, (roots[k], carried[k]))
        failed |= ~ok
    return tuple(new_roots), tuple(new_carried), failures + failed


def _report(
    solve: Solver, ready: Array, b: Blocks, roots: Matrices, carried: Any, failures: Array
) -> Blocks:
    """Hands the roots on, with figures for a monitor, which stands where the factors are gone."""
    matrices = decoded(roots, b.update.dtype)
    figures: dict[str, Any] = {**b.figures, "failures": failures}
    for k, root in enumerate(roots):
        if root is None:
            continue
        if b.matrices:  # none where no part has accumulated factors
            figures[f"factor/{k}"] = b.matrices[k]
        if isinstance(carried[k], tuple) and not carried[k]:
            continue  # a solver that keeps nothing has nothing to say
        for name, value in solve.figures(carried[k]).items():
            figures[name] = figures.get(name, 0) + value
    return dataclasses.replace(b, matrices=matrices, ready=ready, figures=figures)


def precondition(swift: bool = False) -> Part:
    """Multiplies the update by the matrix of each dimension: `L^(-1/4) M R^(-1/4)` for matrices.

    Args:
      swift: Whether products may be TF32 on GPUs that have it and three of bfloat16 numbers on
        TPUs. `scale_by_shampoo` says so where its roots cut off small eigenvalues.

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

    def apply(b: Blocks) -> Blocks:
        return dataclasses.replace(b, update=apply_matrices(b.update, b.matrices, swift=swift))

    return stateless(apply)
