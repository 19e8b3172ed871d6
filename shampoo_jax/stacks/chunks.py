"""Stacks computed a chunk of blocks at a time: temporary memory is that of a chunk."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from shampoo_jax.blocks.blocks import where_block

Array = jax.Array
ByStack = dict[str, Any]
# (stacks, index, what else was cut, state) -> (updates by stack, new state)
Step = Callable[[ByStack, ByStack, ByStack, Any], tuple[ByStack, Any]]
# (blocks by stack) -> (updates and own state by stack, shared state), see `in_chunks`
Compute = Callable[[ByStack], tuple[ByStack, Any]]

# Bytes of the blocks and factors that are computed at a time by default: as many as keep a device
# busy, each core of a CPU with blocks of its own among them.
BYTES = 2**26


def chunk_of(chunk: int | str | None, n: int, block: Sequence[int], powers: Iterable[float]) -> int:
    """How many of n blocks are computed at a time.

    Args:
      chunk: Most of them, `"auto"` for a bound in bytes, or None for all.
      n: Blocks of the stack.
      block: Shape of one.
      powers: Exponents of its dimensions; one of exponent 0 has no factor.

    Returns:
      1 to n, such that chunks are as equal as they can be.

    >>> [chunk_of("auto", 48, (d, d), (0.25, 0.25)) for d in (64, 384, 768, 4096)]
    [48, 24, 8, 1]
    >>> chunk_of(7, 8, (2, 2), (0.25, 0.25))
    4
    """
    if n == 0 or chunk is None:
        return n
    if isinstance(chunk, str):
        factors = [d * d for d, e in zip(block, powers, strict=True) if e]
        size = 4 * max(1, math.prod(block) + sum(factors))
        chunk = max(1, BYTES // size)
    return -(-n // -(-n // chunk))


def in_chunks(step: Step, size_of: Callable[[str, int], int]) -> Step:
    """The same step computed for some blocks of a stack at a time.

    State is written in place. What it holds besides dictionaries of all stacks, counts say, is
    shared by all chunks.

    Args:
      step: It treats every block by itself.
      size_of: Blocks at a time of a stack, of its name and its number of blocks.

    Returns:
      The step, which is the given one where all stacks are computed as a whole.
    """

    def run(stacks: ByStack, index: ByStack, cut: ByStack, state: Any) -> tuple[ByStack, Any]:
        sizes = {key: size_of(key, len(x)) for key, x in stacks.items()}
        whole = [key for key, x in stacks.items() if sizes[key] == len(x)]
        if len(whole) == len(stacks):
            return step(stacks, index, cut, state)
        form = _Form(state, stacks.keys())
        own, shared = form.apart(state, stacks)

        def compute(blocks: ByStack) -> tuple[ByStack, Any]:
            x, numbers, others, kept = (
                {key: fields[i] for key, fields in blocks.items()} for i in range(4)
            )
            new, after = step(x, numbers, others, form.together(kept, shared))
            kept, rest = form.apart(after, new)
            return {key: (new[key], kept[key]) for key in new}, rest

        blocks = {key: (x, index[key], cut[key], own[key]) for key, x in stacks.items()}
        done, rest = compute({key: blocks[key] for key in whole}) if whole else ({}, shared)
        for key in stacks.keys() - whole:
            done[key], rest = _loop(compute, key, sizes[key], blocks[key], shared)
        updates = {key: done[key][0] for key in stacks}
        return updates, form.together({key: done[key][1] for key in stacks}, rest)

    return run


def _loop(compute: Compute, key: str, size: int, blocks: Any, shared: Any) -> tuple[Any, Any]:
    """Updates and state of a stack, and the shared state, `size` blocks at a time.

    One array holds gradients first and updates in the end.
    """
    x, index, cut, own = blocks
    n = len(x)

    def turn(i: Array, carry: Any) -> Any:
        (x, own), _ = carry
        # The last chunk begins earlier where it would be too short; what was done stays.
        begin = jnp.minimum(i * size, n - size)
        fresh = jnp.arange(size) >= i * size - begin
        given = jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, begin, size), (x, index, cut, own)
        )

        def busy(given: Any) -> Any:
            done, rest = compute({key: given})
            return done[key], rest

        def idle(given: Any) -> Any:
            return (given[0], given[3]), shared

        # Always so. Behind a branch chunks are values of their own: fused into their readers they
        # would be read when the stack has been written to, so that XLA copies all of it each time.
        new, rest = jax.lax.cond(given[1][0] >= 0, busy, idle, given)
        if n % size:
            new = jax.tree.map(lambda a, b: where_block(fresh, a, b), new, (given[0], given[3]))
        put = lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, begin, 0)  # noqa: E731
        return jax.tree.map(put, (x, own), new), rest

    return jax.lax.fori_loop(0, -(-n // size), turn, ((x, own), shared))


class _Form:
    """How a state consists of dictionaries with an entry for every stack, and of shared leaves."""

    def __init__(self, state: Any, names: Collection[str]) -> None:
        is_table = lambda x: type(x) is dict and x.keys() == names  # noqa: E731
        entries, self.structure = jax.tree.flatten(state, is_leaf=is_table)
        self.tables = list(map(is_table, entries))

    def apart(self, state: Any, names: Iterable[str]) -> tuple[ByStack, list[Any]]:
        """The entries of each of these stacks, and what is shared."""
        pairs = list(zip(self.structure.flatten_up_to(state), self.tables, strict=True))
        own = {key: [entry[key] for entry, is_table in pairs if is_table] for key in names}
        return own, [entry for entry, is_table in pairs if not is_table]

    def together(self, own: ByStack, shared: list[Any]) -> Any:
        """The state with the entries of some stacks only."""
        columns = zip(*own.values(), strict=True)
        tables = (dict(zip(own, column, strict=True)) for column in columns)
        rest = iter(shared)
        return self.structure.unflatten(next(tables if t else rest) for t in self.tables)
