"""Updates outside of jit: one program, compiled once, instead of one operation after another."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

KINDS = (jax.Array, np.ndarray, np.generic, int, float, complex)


def are_arrays(tree: Any) -> bool:
    """Whether jit can take them: a function, such as a line search is given, cannot be traced."""
    # A part may branch on a flag, which a traced one would not let it do.
    return all(isinstance(x, KINDS) and not isinstance(x, bool) for x in jax.tree.leaves(tree))


def compiled(update: Callable[..., Any]) -> Callable[..., Any]:
    """An Optax update as one program where all that it is given are arrays, else as it is.

    Inside of jit the program is part of the other.
    """
    program = jax.jit(update)

    @functools.wraps(update)
    def run(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        known = are_arrays((updates, state, params, extra))
        return (program if known else update)(updates, state, params, **extra)

    return run
