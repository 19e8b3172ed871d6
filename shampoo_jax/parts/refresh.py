"""When a refresh is due, and refreshing a part of a stack at a time."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from shampoo_jax.base.options import Checked, check_kind, check_options

Array = jax.Array
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Refresh(Checked):
    """How the refreshes of roots or bases are placed in time.

    Attributes:
      start: First step that refreshes, at least `every`; None means `every`. Until then a grafted
        direction is the graft's alone.
      stagger: Whether refreshes are spread over the steps: step `start` refreshes all blocks, each
        later one those whose index equals the step modulo `every`, so that all steps cost the same.
        Such steps have no derivative in reverse mode: leave it out where one optimizes through
        training.
      chunk: Most blocks of one shape that a direction computes at the same time, statistics and
        application included, which bounds temporary memory; None chooses by size, see `chunk_of`.
        In a part by itself, most factors that are solved at the same time; None means all.

    Raises:
      ValueError: A field that is no whole number of at least 1.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.shampoo(0.1, every=10, refresh=shampoo_jax.Refresh(stagger=True))
    """

    start: Any = None
    stagger: bool = False
    chunk: int | None = None


@dataclasses.dataclass(frozen=True)
class BasisRefresh(Refresh):
    """`Refresh` of eigenbases; the defaults are those of the authors of SOAP and KL-Shampoo.

    Attributes:
      start: First step that refreshes, with `when="before"` alone; None means `every`.
      stagger: Whether refreshes are spread over the steps, once all blocks have had their first
        basis: each step refreshes those whose index equals it modulo `every`.
      chunk: As in `Refresh`.
      when: `"after"` uses each gradient before the bases have seen it: the first step's factors are
        decomposed, and from then on the old basis is used and then refreshed (the papers).
        `"before"` refreshes from factors that include this step's gradient, then uses the new basis
        (Meta); bases are identities until step `start`.
      skip_first: With `"after"`, whether the first step only fills factors and bases: its update is
        zero, and the part that runs in the bases does not see it.
      reorder: Whether second moments follow when columns are sorted; None: where the basis tells
        how, which only the authors' `QRBasis(sort="before")` does.

    Raises:
      ValueError: A field out of range, or `start` or `skip_first` beside the other `when`.

    Example:
      >>> import shampoo_jax
      >>> meta = shampoo_jax.BasisRefresh(when="before", skip_first=False, reorder=False)
      >>> tx = shampoo_jax.soap(3e-3, every=1, refresh=meta)
    """

    when: Literal["before", "after"] = "after"
    skip_first: bool = True
    reorder: bool | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a field out of range and for fields that contradict each other."""
        super().__post_init__()
        if self.start is not None and self.when == "after":
            raise ValueError(f"start={self.start} with when='after': drop start, or use 'before'.")
        if self.skip_first and self.when == "before":
            raise ValueError("skip_first=True needs when='after': set one or the other.")


def refresh_due(count: Array, every: int | Array, start: int | Array) -> Array:
    """Whether step `count` (1-based) recomputes: at `start`, then at every multiple of `every`.

    With `every=3, start=4` these are the steps 4, 6, 9, 12.
    """
    return (count == start) | ((count % every == 0) & (count > start))


class Schedule(NamedTuple):
    """When what is refreshed; made by `make_schedule`.

    Attributes:
      every: Steps between refreshes.
      start: First step that refreshes.
      stagger: Whether each later step refreshes a share.
      chunk: Most slots of a stack that are computed at a time; None for all.
    """

    every: Any
    start: Any
    stagger: bool
    chunk: int | None

    @property
    def always(self) -> bool:
        """Whether every step is known to refresh all slots."""
        known = isinstance(self.every, int) and isinstance(self.start, int)
        return known and self.every == self.start == 1

    def run(self, refresh: Callable[[Array | None, T], T], count: Array, state: T) -> T:
        """Runs a refresh where it is due; without a branch where it always is.

        Staggered, none runs before step `start`, all shares at it, then one share a step. Those of
        step `start` run one after the other through the code of a single one, so it needs no
        program and no memory of its own.

        Args:
          refresh: Function of (turn, state), see `share`.
          count: Step, 1-based.
          state: What `refresh` changes.

        Returns:
          The new state.
        """
        if self.always:
            return refresh(None, state)
        if not self.stagger or self.every == 1:
            due = refresh_due(count, self.every, self.start)
            return when(due, functools.partial(refresh, None), state)
        turns = jnp.where(count == self.start, self.every, (count > self.start).astype(int))
        return jax.lax.fori_loop(0, turns, lambda i, s: refresh(count + i, s), state)

    def share(self, f: Callable[..., T], slots: Any, turn: Any, old: T, *reads: Any) -> T:
        """`refresh_slots`, a chunk at a time; turn None is that of all slots."""
        if self.chunk is not None:
            f = functools.partial(in_chunks, f, self.chunk)
        if turn is None:
            return f(old, *reads)
        return refresh_slots(f, slots, turn, self.every, old, *reads)


def refresh_of_bases(refresh: BasisRefresh | None) -> BasisRefresh:
    """What is given, or the authors' way; raises ValueError for the `Refresh` of roots."""
    check_kind("refresh", refresh, BasisRefresh, "BasisRefresh(stagger=True)")
    return BasisRefresh() if refresh is None else refresh


def make_schedule(every: Any, refresh: Refresh) -> Schedule:
    """A schedule; raises ValueError where what is known now makes no sense."""
    check_options({"every": every})
    start = every if refresh.start is None else refresh.start
    # NumPy's whole numbers are as good as Python's.
    every, start = (int(n) if isinstance(n, np.integer) else n for n in (every, start))
    if isinstance(start, int) and isinstance(every, int) and start < every:
        raise ValueError(
            f"start={start} must not be below every={every}: the first refresh is at step start."
        )
    if refresh.stagger and not isinstance(every, int):
        raise ValueError(
            f"every={every} with stagger=True must be a Python int: name it in static_args."
        )
    return Schedule(every, start, refresh.stagger, refresh.chunk)


def when(condition: Array, f: Callable[[T], T], operand: T) -> T:
    """`f(operand)` if the condition holds, else the operand."""
    return jax.lax.cond(condition, f, lambda same: same, operand)


def refresh_slots(
    f: Callable[..., T], slots: Any, turn: Array, every: int, old: T, *reads: Any
) -> T:
    """Applies `f` to the slots of a stack whose turn it is: those equal to `turn` modulo `every`.

    As many are computed at each turn, `N / every` rounded up, by one program with static shapes:
    where no slot is left for the last place, a result is dropped. Of a stack of fewer than `every`
    slots nothing is computed when none is due.

    Args:
      f: Function of (old, *reads) of some slots giving new values for `old`.
      slots: `int32[N]`, consecutive numbers: positions among the blocks of all stacks.
      turn: Integer, the step.
      every: Static number of turns until all slots have had theirs.
      old: Tree of arrays `[N, ...]`.
      *reads: Likewise.

    Returns:
      `old` with new values in those slots.

    >>> old = jnp.zeros(5, jnp.int32)
    >>> refresh_slots(lambda o: o + 1, jnp.arange(2, 7), jnp.array(6), 3, old).tolist()
    [0, 1, 0, 0, 1]
    """
    n = len(slots)
    first = (turn - slots[0]) % every
    at = first + every * jnp.arange(-(-n // every))

    def share() -> T:
        new = f(*jax.tree.map(lambda x: x.at[at].get(mode="clip"), (old, *reads)))
        options: Any = {"mode": "drop", "unique_indices": True, "indices_are_sorted": True}
        return jax.tree.map(lambda o, x: o.at[at].set(x.astype(o.dtype), **options), old, new)

    return share() if n >= every else jax.lax.cond(first < n, share, lambda: old)


def in_chunks(f: Callable[..., Any], size: int, *stacks: Any) -> Any:
    """`f(*stacks)` computed for at most `size` slots at a time, to bound its working memory.

    All chunks have one size and so one program; the last slot fills up the last one.

    Args:
      f: Function of trees of arrays `[n, ...]`, for any n, returning such a tree.
      size: Slots at a time.
      *stacks: Trees of arrays `[N, ...]`.

    Returns:
      A tree of arrays `[N, ...]`.

    >>> in_chunks(lambda x: 2 * x, 2, jnp.arange(5)).tolist()
    [0, 2, 4, 6, 8]
    """
    n = len(jax.tree.leaves(stacks)[0])
    if n <= size:
        return f(*stacks)
    count = -(-n // size)
    slots = jnp.arange(count * -(-n // count)).reshape(count, -1)
    chunks = jax.tree.map(lambda x: x.at[slots].get(mode="clip"), stacks)
    done = jax.lax.map(lambda chunk: f(*chunk), chunks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], done)
