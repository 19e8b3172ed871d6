"""Exponents of the inverse roots by block shape and dimension."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

from shampoo_jax.base.options import is_number, refuse

# Exponents of one block shape: one number a dimension; 0 leaves a dimension alone.
Exponents = Callable[[tuple[int, ...]], tuple[float, ...]]

Side = Literal["left", "right", "smaller"]
Named = Side | Literal["bounded"]
ExponentOption = Mapping[int, float | Mapping[int, float]] | float | Named | Exponents | None
AutoExponents = ExponentOption | Literal["auto"]

# Ahead of 1/4 in docs/recipe.md, and of 1/2 where the norm is not Adam's.
# Other blocks keep `1 / (2 * ndim)`.
GRAFTED = {2: 1 / 3}


def chosen_exponents(option: AutoExponents, graft: Any) -> ExponentOption:
    """What `"auto"` is for a graft: without one, 1/4 alone keeps the scale of gradients out.

    >>> chosen_exponents("auto", "adam"), chosen_exponents("auto", None)
    ({2: 0.3333333333333333}, None)
    """
    if not (isinstance(option, str) and option == "auto"):
        return option
    return None if graft is None else GRAFTED


def default_exponents(shape: tuple[int, ...]) -> tuple[float, ...]:
    """Shampoo's `1 / (2 * ndim)` on every dimension (Gupta et al. 2018, algorithm 2)."""
    return (1 / (2 * max(len(shape), 1)),) * len(shape)


def left_side(shape: tuple[int, ...]) -> tuple[float, ...]:
    """1/2 on the first dimension only."""
    return tuple(0.5 * (k == 0) for k in range(len(shape)))


def right_side(shape: tuple[int, ...]) -> tuple[float, ...]:
    """1/2 on the last dimension only."""
    return left_side(shape)[::-1]


def smaller_side(shape: tuple[int, ...]) -> tuple[float, ...]:
    """1/2 on the smallest dimension only, the last one of several."""
    smallest = min(range(len(shape)), key=lambda k: (shape[k], -k), default=0)
    return tuple(0.5 * (k == smallest) for k in range(len(shape)))


LARGEST_FACTOR = 10_000  # edge; the authors' `max_precond_dim`
LARGEST_SHARE = 64  # entries of a factor as a multiple of its block's


def bounded_exponents(shape: tuple[int, ...]) -> tuple[float, ...]:
    """Shampoo's exponents, but 0 where a factor would be out of proportion.

    That is of a dimension of more than 10,000, and of one whose square has more than 64 times the
    entries of the whole block, unless it is the only one: the long side of a thin matrix.

    >>> bounded_exponents((4096, 8)), bounded_exponents((50257, 768)), bounded_exponents((512, 8))
    ((0.0, 0.25), (0.0, 0.25), (0.25, 0.25))
    """
    entries = math.prod(shape) if len(shape) > 1 else math.inf
    fits = (d <= LARGEST_FACTOR and d * d <= LARGEST_SHARE * entries for d in shape)
    return tuple(e * fit for e, fit in zip(default_exponents(shape), fits, strict=True))


SIDES: dict[str, Exponents] = {"left": left_side, "right": right_side, "smaller": smaller_side}
NAMED = {**SIDES, "bounded": bounded_exponents}


def resolve_exponents(option: ExponentOption) -> Exponents:
    """The option `exponents` as a function from block shape to exponents.

    Args:
      option: None, a number, a mapping from the number of dimensions to a number or to {dimension:
        number}, `"left"`, `"right"` or `"smaller"` for one factor a block, `"bounded"` for
        `bounded_exponents`, or such a function itself.

    Returns:
      Function of the shape of a block giving one exponent a dimension; what the option leaves out
      is `1 / (2 * ndim)`.

    Raises:
      ValueError: An exponent that is negative or no finite number, a key that is no int, a
        dimension that blocks do not have, or another name.

    Example:
      >>> resolve_exponents({2: 1 / 3})((8, 4)), resolve_exponents("left")((8, 4))
      ((0.3333333333333333, 0.3333333333333333), (0.5, 0.0))
    """
    if option is None:
        return default_exponents
    if isinstance(option, str):
        if option not in NAMED:
            raise ValueError(
                f"exponents={option!r}: the only names are {sorted(NAMED)}, and 'auto' where it is "
                "the default."
            )
        return NAMED[option]
    if isinstance(option, type):
        refuse("exponents", option, ": give a number, or a function of the shape of a block")
    if callable(option):
        return functools.partial(_checked, option)
    for keys, value in _entries(option):
        _check_entry(keys, value)

    def exponents(shape: tuple[int, ...]) -> tuple[float, ...]:
        entry = option.get(len(shape), {}) if isinstance(option, Mapping) else option
        if not isinstance(entry, Mapping):
            return (float(entry),) * len(shape)
        return tuple(float(entry.get(k, e)) for k, e in enumerate(default_exponents(shape)))

    return exponents


def _checked(function: Exponents, shape: tuple[int, ...]) -> tuple[float, ...]:
    """What a function of one's own gives for a block, once it is known to fit."""
    found = function(shape)
    if not isinstance(found, Sequence) or len(found) != len(shape):
        raise ValueError(
            f"exponents gives {found!r} for blocks of shape {shape}: one number a dimension is "
            "needed."
        )
    for value in found:
        _check_entry((), value)
    return tuple(map(float, found))


def given_exponents(option: ExponentOption) -> set[float]:
    """The non-zero exponents that an option names."""
    resolve_exponents(option)  # refuses what is no number
    if option is None or callable(option):
        return set()
    if isinstance(option, str):
        return {0.5} if option in SIDES else set()
    return {float(value) for _, value in _entries(option)} - {0.0}


def _entries(option: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Numbers that an option names, each with its keys: none, (ndim,) or (ndim, dimension)."""
    if not isinstance(option, Mapping):
        yield (), option
        return
    for key, entry in option.items():
        yield from (((key, *keys), value) for keys, value in _entries(entry))


def _check_entry(keys: tuple[Any, ...], value: Any) -> None:
    for key in keys:
        if not isinstance(key, Integral):
            raise ValueError(f"exponents has the key {key!r}: numbers of dimensions are ints.")
    if isinstance(value, bool) or not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(
            f"exponents: {value!r} must not be negative, or anything but a finite number: 0.5 "
            "stands for S^(-1/2)."
        )
    if len(keys) > 1 and not 0 <= keys[1] < keys[0]:
        raise ValueError(
            f"exponents[{keys[0]}] names dimension {keys[1]}: blocks of {keys[0]} dimensions have "
            f"0 to {keys[0] - 1}."
        )
