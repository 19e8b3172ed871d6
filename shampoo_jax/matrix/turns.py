"""Chains of matrix products as data: spelt out in the program, or one product in a loop.

The compiler of a TPU takes seconds for each product of a program, that of a GPU copies what a loop
carries, so the same chain is written out for one and looped over for the other.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shampoo_jax.matrix.products import identity_like

Array = jax.Array
# Coefficients, numbers or arrays `[..., 1, 1]`, of "I", the identity, and of matrices by name.
Combination = Mapping[str, Array | float]
Product = Callable[[Array, Array], Array]


class Turn(NamedTuple):
    """One product: `into <- left @ right`, then what is made of it.

    Attributes:
      into: Name of the result.
      left: What is multiplied.
      right: By what.
      symmetric: Whether the mean of the product and its transpose is kept.
      affine: (a, b) where `a I + b X` is kept.
    """

    into: str
    left: Combination
    right: Combination
    symmetric: bool = False
    affine: tuple[Array | float, Array | float] | None = None


def run_turns(
    turns: Sequence[Turn], matrices: Mapping[str, Array], product: Product, *, loop: bool
) -> dict[str, Array]:
    """The matrices after all turns.

    Args:
      turns: In their order.
      matrices: By name, stacks `[..., d, d]` of one shape. Names that turns make are zero before.
      product: Of two stacks.
      loop: Whether the program has one product in a loop, or all of them.

    >>> square = Turn("X", {"X": 1.0}, {"I": 1.0, "X": 2.0})  # X (I + 2 X)
    >>> x = {"X": 2 * jnp.eye(1)}
    >>> [run_turns([square] * 2, x, jnp.matmul, loop=b)["X"].item() for b in (False, True)]
    [210.0, 210.0]
    """
    return (_looped if loop else _spelt_out)(turns, matrices, product)


def combine(combination: Combination, matrices: Mapping[str, Array]) -> Array:
    """`c_0 I + c_1 P_1 + c_2 P_2 + ...` of given matrices."""
    if list(combination.values()) == [1.0]:
        return matrices[next(iter(combination))]
    like = next(iter(matrices.values()))
    terms = [c * (identity_like(like) if n == "I" else matrices[n]) for n, c in combination.items()]
    return sum(terms[1:], terms[0])


def symmetric_part(x: Array) -> Array:
    """`(X + X^T) / 2`."""
    return (x + x.swapaxes(-1, -2)) / 2


def _spelt_out(
    turns: Sequence[Turn], matrices: Mapping[str, Array], product: Product
) -> dict[str, Array]:
    now, made = dict(matrices), list[tuple[Combination, Array]]()
    for turn in turns:
        operands = []
        for combination in (turn.left, turn.right):
            known = [x for c, x in made if c is combination]
            operands.append(known[0] if known else combine(combination, now))
            made.append((combination, operands[-1]))
        value = product(*operands)
        value = symmetric_part(value) if turn.symmetric else value
        if turn.affine:
            value = combine(dict(zip("IX", turn.affine, strict=True)), {"X": value})
        now[turn.into] = value
        made = [(c, x) for c, x in made if turn.into not in c]
    return now


def _looped(
    turns: Sequence[Turn], matrices: Mapping[str, Array], product: Product
) -> dict[str, Array]:
    names = sorted({*matrices, *(turn.into for turn in turns)})
    like = next(iter(matrices.values()))
    zero = jnp.zeros_like(like)
    stack = jnp.stack([matrices.get(name, zero) for name in names])
    per_matrix = zero[..., :1, :1]  # has the sharding type that shard_map demands of loop state

    def column(rows: Sequence[Sequence[Array | float]]) -> Array:
        # Numbers in one array; what is known at run time is put between them.
        arrays = {(i, j): c for i, row in enumerate(rows) for j, c in enumerate(row)}
        arrays = {at: c for at, c in arrays.items() if isinstance(c, Array)}
        numbers = [
            [0.0 if (i, j) in arrays else c for j, c in enumerate(row)]
            for i, row in enumerate(rows)
        ]
        shape = (len(rows), len(rows[0]), *(1,) * per_matrix.ndim)
        filled = per_matrix[None, None] + np.array(numbers, per_matrix.dtype).reshape(shape)
        for at, value in arrays.items():
            filled = filled.at[at].set(value)
        return filled

    def turn(stack: Array, now: tuple[Array, ...]) -> tuple[Array, None]:
        left, right, affine, symmetric, into = now
        parts = (identity_like(like), *stack)
        a, b = (
            functools.reduce(jnp.add, (c * x for c, x in zip(side, parts, strict=True)))
            for side in (left, right)
        )
        value = product(a, b)
        value = jnp.where(symmetric, symmetric_part(value), value)
        value = affine[0] * parts[0] + affine[1] * value
        return jax.lax.dynamic_update_index_in_dim(stack, value, into, 0), None

    columns = (
        column([[t.left.get(name, 0.0) for name in ("I", *names)] for t in turns]),
        column([[t.right.get(name, 0.0) for name in ("I", *names)] for t in turns]),
        column([t.affine or (0.0, 1.0) for t in turns]),
        jnp.array([t.symmetric for t in turns]),
        jnp.array([names.index(t.into) for t in turns]),
    )
    return dict(zip(names, jax.lax.scan(turn, stack, columns)[0], strict=True))
