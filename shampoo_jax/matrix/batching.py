"""Decompositions of stacks: batched on accelerators, one matrix at a time on CPU."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

AT_ONCE = 8  # matrices of a stack that an accelerator takes together where it takes a part of them


def map_matrices(function: Callable[..., Any], leading: tuple[int, ...], *arrays: jax.Array) -> Any:
    """Applies a function of single matrices to every matrix of a stack.

    On CPU the matrices are taken one at a time: with jax 0.10 two batched LAPACK calls (eigh, QR)
    of different shapes in one program can starve XLA's thread pool for ever (measured on 2 cores).
    They stay apart under `vmap`, see `_alone`.

    Args:
      function: Takes as many arrays as given, without leading axes; returns a tree of arrays.
      leading: Static shape of the axes that `arrays` share and `function` does not see.
      *arrays: Of shapes `[*leading, ...]`.

    Returns:
      The tree of `function` with `leading` axes in front.

    >>> import jax.numpy as jnp
    >>> map_matrices(jnp.trace, (2, 1), jnp.ones((2, 1, 3, 3))).tolist()
    [[3.0], [3.0]]
    """
    if len(leading) != 1:
        count, axes = math.prod(leading), len(leading)
        flat = (x.reshape(count, *x.shape[axes:]) for x in arrays)
        mapped = map_matrices(function, (count,), *flat)
        return jax.tree.map(lambda x: x.reshape(*leading, *x.shape[1:]), mapped)
    one = lambda matrices: function(*matrices)  # noqa: E731
    one_at_a_time = functools.partial(jax.lax.map, _alone(one))
    return jax.lax.platform_dependent(arrays, cpu=one_at_a_time, default=jax.vmap(one))


def _alone(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function of a tree of single matrices, which `vmap` calls for one member after another.

    Without it `vmap` of a loop over matrices is a loop whose body takes those of all members in
    one call. The derivative is that of the function itself, and not kept apart.
    """
    alone = jax.custom_jvp(jax.custom_batching.sequential_vmap(function))
    alone.defjvp(functools.partial(jax.jvp, function))
    return alone


def map_selected(
    function: Callable[..., Any], selected: jax.Array, old: Any, *arrays: jax.Array
) -> Any:
    """Applies a function of single matrices to some matrices of a stack; the others cost nothing.

    A loop takes one selected matrix at a time on CPU, see `map_matrices`, and `AT_ONCE` elsewhere.

    Args:
      function: Takes as many arrays as given, without leading axis; returns a tree like `old`.
      selected: `bool[N]`.
      old: Tree of arrays `[N, ...]`, the result for the others.
      *arrays: Of shapes `[N, ...]`.

    Returns:
      A tree like `old`.

    >>> map_selected(jnp.negative, jnp.array([True, False]), jnp.zeros(2), jnp.ones(2)).tolist()
    [-1.0, 0.0]
    """
    run = jax.custom_jvp(functools.partial(_loop_over, function))

    @run.defjvp
    def derivative(primals: Any, tangents: Any) -> tuple[Any, Any]:
        # A loop of unknown length has no reverse mode; one over all matrices has.
        return jax.jvp(functools.partial(_over_all, function), primals, tangents)

    return run(selected, old, *arrays)


def _over_all(function: Callable[..., Any], selected: jax.Array, old: Any, *arrays: Any) -> Any:
    """`map_selected` by a loop over all matrices, the others left alone."""

    def one(place: tuple[jax.Array, Any, Any]) -> Any:
        selected, old, matrices = place
        new = lambda: jax.tree.map(lambda o, x: x.astype(o.dtype), old, function(*matrices))  # noqa: E731
        return jax.lax.cond(selected, new, lambda: old)

    return jax.lax.map(one, (selected, old, arrays))


def _loop_over(function: Callable[..., Any], selected: jax.Array, old: Any, *arrays: Any) -> Any:
    """`map_selected` by a loop over the selected matrices."""
    n = len(selected)

    def loop(size: int, call: Any, selected: jax.Array, old: Any, *arrays: jax.Array) -> Any:
        (places,) = jnp.nonzero(selected, size=n + size - 1, fill_value=n)  # n is nowhere

        def turn(i: jax.Array, results: Any) -> Any:
            at = jax.lax.dynamic_slice(places, (i * size,), (size,))
            new = call(tuple(x.at[at].get(mode="clip") for x in arrays))
            return jax.tree.map(lambda r, x: r.at[at].set(x, mode="drop"), results, new)

        return jax.lax.fori_loop(0, (selected.sum() + size - 1) // size, turn, old)

    of = lambda matrices: function(*matrices)  # noqa: E731
    one = functools.partial(loop, 1, jax.vmap(_alone(of)))
    some = functools.partial(loop, min(n, AT_ONCE), jax.vmap(of))
    return jax.lax.platform_dependent(selected, old, *arrays, cpu=one, default=some)
