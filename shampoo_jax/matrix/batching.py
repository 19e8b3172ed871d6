"""Decompositions of stacks: batched on accelerators, one matrix at a time on CPU."""

import math
from collections.abc import Callable
from typing import Any

import jax


def map_matrices(function: Callable[..., Any], leading: tuple[int, ...], *arrays: jax.Array) -> Any:
    """Applies a function of single matrices to every matrix of a stack.

    On CPU the matrices are taken one at a time: with jax 0.10 two batched LAPACK calls (eigh, QR)
    of different shapes in one program can starve XLA's thread pool for ever (measured on 2 cores).

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
    count, axes = math.prod(leading), len(leading)
    flat = [array.reshape(count, *array.shape[axes:]) for array in arrays]

    def one_at_a_time(*stacks: jax.Array) -> Any:
        return jax.lax.map(lambda matrices: function(*matrices), stacks)

    mapped = jax.lax.platform_dependent(*flat, cpu=one_at_a_time, default=jax.vmap(function))
    return jax.tree.map(lambda array: array.reshape(*leading, *array.shape[1:]), mapped)
