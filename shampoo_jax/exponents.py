"""Exponents of the inverse roots by block order and dimension."""

from collections.abc import Callable, Mapping

# Exponents of one block order: one number a dimension; 0 leaves a dimension alone.
Exponents = Callable[[int], tuple[float, ...]]

ExponentOption = Mapping[int, float | Mapping[int, float]] | float | None


def default_exponents(order: int) -> tuple[float, ...]:
    """Shampoo's `1 / (2 * order)` on every dimension (Gupta et al. 2018, algorithm 2)."""
    return (1 / (2 * max(order, 1)),) * order


def resolve_exponents(option: ExponentOption) -> Exponents:
    """The option of `scale_by_shampoo` as a function from block order to exponents.

    Args:
      option: None, a number, or a mapping from order to a number or to {dimension: number}.

    Returns:
      Function of the order giving one exponent a dimension; what the option leaves out is
      `1 / (2 * order)`.

    Raises:
      ValueError: A negative exponent, or a dimension that the order does not have.
    """
    if option is None:
        return default_exponents
    if isinstance(option, (int, float)):
        _check_exponent(option)
        return lambda order: (float(option),) * order

    for order, entry in option.items():
        for dim, value in entry.items() if isinstance(entry, Mapping) else ((0, entry),):
            _check_exponent(value)
            if isinstance(entry, Mapping) and not 0 <= dim < order:
                raise ValueError(
                    f"exponents[{order}] names dimension {dim}: blocks of order {order} have "
                    f"dimensions 0 to {order - 1}."
                )

    def exponents(order: int) -> tuple[float, ...]:
        entry = option.get(order, {})
        if not isinstance(entry, Mapping):
            return (float(entry),) * order
        default = default_exponents(order)
        return tuple(float(entry.get(k, default[k])) for k in range(order))

    return exponents


def _check_exponent(value: float) -> None:
    if value < 0:
        raise ValueError(f"exponent {value} must not be negative: roots are inverse already.")


def given_exponents(option: ExponentOption) -> set[float]:
    """The non-zero exponents that an option names."""
    if option is None:
        return set()
    if isinstance(option, (int, float)):
        return {float(option)} - {0.0}
    entries = [e.values() if isinstance(e, Mapping) else (e,) for e in option.values()]
    return {float(x) for values in entries for x in values} - {0.0}
