"""When a refresh is due, and refreshing a part of a stack at a time."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Array = jax.Array
T = TypeVar("T")


def refresh_due(count: Array, every: int | Array, start: int | Array) -> Array:
    """Whether step `count` (1-based) recomputes: at `start`, then at every multiple of `every`.

    With `every=3, start=4` these are the steps 4, 6, 9, 12.
    """
    return (count == start) | ((count % every == 0) & (count > start))


def check_schedule(every: Any, start: Any, stagger: bool = False) -> None:
    """Raises ValueError where a refresh interval or first step known now makes no sense."""
    if isinstance(every, int) and every < 1:
        raise ValueError(f"every={every} must be at least 1 step.")
    if isinstance(start, int) and isinstance(every, int) and start < every:
        raise ValueError(
            f"start={start} must not be below every={every}: the first refresh is at step start."
        )
    if stagger and not isinstance(every, int):
        raise ValueError(
            f"every={every} with stagger=True must be a Python int, since it decides how many "
            "blocks a step refreshes: name it in static_args, or set stagger=False."
        )


def scheduled(
    refresh: Callable[[Array | None, T], T],
    count: Array,
    every: Any,
    start: Any,
    stagger: bool,
    state: T,
) -> T:
    """Runs a refresh where it is due; without a branch where it always is.

    Args:
      refresh: Function of (turn, state), see `staggered`; turn None refreshes all slots.
      count: Step, 1-based.
      every: Steps between refreshes.
      start: First step that refreshes.
      stagger: Whether each step refreshes a share.
      state: What `refresh` changes.

    Returns:
      The new state.
    """
    if isinstance(every, int) and isinstance(start, int) and every == start == 1:
        return refresh(None, state)
    if stagger and every != 1:
        return staggered(refresh, count, every, start, state)
    due = refresh_due(count, every, start)
    return jax.lax.cond(due, lambda s: refresh(None, s), lambda same: same, state)


def staggered(
    refresh: Callable[[Array, T], T], count: Array, every: Any, start: int | Array, state: T
) -> T:
    """Runs a refresh of one slot in `every`: none before `start`, all at `start`, then one share.

    The shares of step `start` run one after the other through the code of a single one, so it needs
    no program and no memory of its own.

    Args:
      refresh: Function of (turn, state) that refreshes the slots of that turn, see `refresh_slots`.
      count: Step, 1-based.
      every: Static number of shares.
      start: First step that refreshes.
      state: What `refresh` changes.

    Returns:
      The new state.
    """
    turns = jnp.where(count == start, every, (count > start).astype(int))
    return jax.lax.fori_loop(0, turns, lambda i, s: refresh(count + i, s), state)


def refresh_slots(
    f: Callable[..., T],
    slots: Array,
    turn: Array | None,
    every: Any,
    old: T,
    *reads: Any,
    real: Array | None = None,
) -> T:
    """Applies `f` to the slots of a stack whose turn it is: those equal to `turn` modulo `every`.

    As many are computed at each turn, `N / every` rounded up, by one program with static shapes:
    where no slot is left for the last place, a result is dropped. Of a stack of fewer than `every`
    slots nothing is computed when none is due.

    Args:
      f: Function of (old, *reads) of some slots giving new values for `old`.
      slots: `int32[N]`, consecutive numbers: positions among the blocks of all stacks.
      turn: Integer, the step; None for all slots at once.
      every: Static number of turns until all slots have had theirs.
      old: Tree of arrays `[N, ...]`.
      *reads: Likewise.
      real: `bool[N]`, the slots to compute, one after the other; None for all, together.

    Returns:
      `old` with new values in those slots.

    >>> old = jnp.zeros(5, jnp.int32)
    >>> refresh_slots(lambda o: o + 1, jnp.arange(2, 7), jnp.array(6), 3, old).tolist()
    [0, 1, 0, 0, 1]
    """
    if real is not None:
        f, reads = _where_real(f), (real, *reads)
    if turn is None:
        return f(old, *reads)
    n = len(slots)
    first = (turn - slots[0]) % every

    at = first + every * jnp.arange(-(-n // every))

    def share() -> T:
        new = f(*jax.tree.map(lambda x: x.at[at].get(mode="clip"), (old, *reads)))
        options: Any = {"mode": "drop", "unique_indices": True, "indices_are_sorted": True}
        return jax.tree.map(lambda o, x: o.at[at].set(x.astype(o.dtype), **options), old, new)

    return share() if n >= every else jax.lax.cond(first < n, share, lambda: old)


def _where_real(f: Callable[..., T]) -> Callable[..., T]:
    """`f` as a function of (old, real, *reads), one slot after the other, those real only."""

    def one(slot: tuple[T, Array, *tuple[Any, ...]]) -> T:
        old, real, *reads = jax.tree.map(lambda x: x[None], slot)
        new = jax.lax.cond(real[0], lambda: _like(f(old, *reads), old), lambda: old)
        return jax.tree.map(lambda x: x[0], new)

    return lambda *stacks: jax.lax.map(one, stacks)


def _like(new: T, old: T) -> T:
    return jax.tree.map(lambda x, o: x.astype(o.dtype), new, old)


def in_chunks(f: Callable[..., Any], size: int | None, *stacks: Any) -> Any:
    """`f(*stacks)` computed for at most `size` slots at a time, to bound its working memory.

    Args:
      f: Function of trees of arrays `[n, ...]`, for any n, returning such a tree.
      size: Slots at a time; None for all.
      *stacks: Trees of arrays `[N, ...]`.

    Returns:
      A tree of arrays `[N, ...]`.

    >>> in_chunks(lambda x: 2 * x, 2, jnp.arange(5)).tolist()
    [0, 2, 4, 6, 8]
    """
    n = len(jax.tree.leaves(stacks)[0])
    if size is None or n <= size:
        return f(*stacks)
    whole = n - n % size
    chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), stacks)
    done = jax.lax.map(lambda chunk: f(*chunk), chunks)
    done = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), done)
    if whole == n:
        return done
    rest = f(*jax.tree.map(lambda x: x[whole:], stacks))
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), done, rest)
