"""Exponents of the inverse roots by block shape and dimension."""

import math
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, Literal

from shampoo_jax.base.options import is_number

# Exponents of one block shape: one number a dimension; 0 leaves a dimension alone.
Exponents = Callable[[tuple[int, ...]], tuple[float, ...]]

Side = Literal["left", "right", "smaller"]
ExponentOption = Mapping[int, float | Mapping[int, float]] | float | Side | Exponents | None


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


SIDES: dict[str, Exponents] = {"left": left_side, "right": right_side, "smaller": smaller_side}


def resolve_exponents(option: ExponentOption) -> Exponents:
    """The option `exponents` as a function from block shape to exponents.

    Args:
      option: None, a number, a mapping from the number of dimensions to a number or to {dimension:
        number}, a name in `SIDES` for one factor a block, or such a function itself.

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
        if option not in SIDES:
            raise ValueError(f"exponents={option!r}: the only names are {sorted(SIDES)}.")
        return SIDES[option]
    if callable(option):
        return option
    if not isinstance(option, Mapping):
        _check_exponent(option)
        return lambda shape: (float(option),) * len(shape)
    _check_mapping(option)

    def exponents(shape: tuple[int, ...]) -> tuple[float, ...]:
        entry = option.get(len(shape), {})
        if not isinstance(entry, Mapping):
            return (float(entry),) * len(shape)
        return tuple(float(entry.get(k, e)) for k, e in enumerate(default_exponents(shape)))

    return exponents


def _check_mapping(option: Mapping[int, Any]) -> None:
    for ndim, entry in option.items():
        _check_key(ndim)
        for dim, value in entry.items() if isinstance(entry, Mapping) else ((0, entry),):
            _check_key(dim)
            _check_exponent(value)
            if isinstance(entry, Mapping) and not 0 <= dim < ndim:
                raise ValueError(
                    f"exponents[{ndim}] names dimension {dim}: blocks of {ndim} dimensions have "
                    f"0 to {ndim - 1}."
                )


def _check_key(key: Any) -> None:
    if not isinstance(key, Integral):
        raise ValueError(f"exponents has the key {key!r}: numbers of dimensions are ints.")


def _check_exponent(value: Any) -> None:
    if isinstance(value, bool) or not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(
            f"exponent {value!r} must not be negative, or anything but a finite number: 0.5 stands "
            "for S^(-1/2)."
        )


def given_exponents(option: ExponentOption) -> set[float]:
    """The non-zero exponents that an option names."""
    if option is None or callable(option):
        return set()
    if isinstance(option, str):
        return {0.5}
    if not isinstance(option, Mapping):
        return {float(option)} - {0.0}
    entries = [e.values() if isinstance(e, Mapping) else (e,) for e in option.values()]
    return {float(x) for values in entries for x in values} - {0.0}
