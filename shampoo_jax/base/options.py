"""Options refused at construction: values out of range, and pairs that contradict each other."""

import numbers
from collections.abc import Mapping
from typing import Any, TypeGuard

import jax
import numpy as np

WHOLE = ("block_size", "merge", "every", "start", "monitor")
AT_LEAST = {"chunk": 1, "iterations": 1, "max_iterations": 1, "order": 2}  # whole numbers as well
NOT_NEGATIVE = (
    *("eps", "atol", "factor_eps", "graft_eps", "first_weight", "adamw_eps"),
    *("rel_epsilon", "abs_epsilon", "tolerance", "max_residual"),
)


def is_number(x: Any) -> TypeGuard[float]:
    """Whether a value is a plain number: not None, a name or an object, and not traced."""
    return isinstance(x, numbers.Real)


def is_off(value: Any) -> bool:
    """Whether an option is a plain 0."""
    return is_number(value) and value == 0


def check_range(name: str, value: Any, *, closed: bool = False) -> None:
    """Raises ValueError where a decay known now is outside [0, 1), or [0, 1] if closed."""
    if is_number(value) and not (0 <= value < 1 or (closed and value == 1)):
        interval = "[0, 1]" if closed else "[0, 1)"
        raise ValueError(f"{name}={value} must lie in {interval}.")


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for what no direction and no complete optimizer can do.

    Options mean the same wherever they appear, so they are known by name. Traced values pass.

    Args:
      options: Options of a function by name, as its `locals()` at its first line.
    """
    for name, value in options.items():
        if name in WHOLE or name in AT_LEAST:
            _check_whole(name, value)
        elif name in NOT_NEGATIVE and is_number(value) and not value >= 0:
            raise ValueError(f"{name}={value} must not be negative.")
        elif name == "rtol":
            check_range(name, value)
        elif name == "exponent" and is_number(value) and not value > 0:
            raise ValueError(f"exponent={value} must be positive: 0.5 is the paper's.")
        elif name == "cap" and value != "size" and not (is_number(value) and value > 0):
            raise ValueError(f"cap={value!r}: use 'size' or a positive number.")
    _check_pairs(options)


class Checked:
    """Dataclass whose fields are refused like options of their names."""

    def __post_init__(self) -> None:
        """Raises ValueError for a field out of range."""
        check_options(vars(self))


def _check_whole(name: str, value: Any) -> None:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if value is not None and not whole and not isinstance(value, jax.Array):
        raise ValueError(f"{name}={value!r} must be a whole number.")
    if value is not None and name in AT_LEAST and value < AT_LEAST[name]:
        raise ValueError(f"{name}={value} must be at least {AT_LEAST[name]}.")


def _check_pairs(options: Mapping[str, Any]) -> None:
    given = options.get
    b1, b3 = given("b1"), given("b3")
    if is_number(b1) and b1 == 0 and b3 is not None and not is_off(b3):
        raise ValueError(
            f"b3={b3} with b1=0: there is no first moment to mix in, drop b3 or set b1 above 0."
        )
    if is_off(b1) and given("mu_dtype") is not None:
        raise ValueError(
            f"mu_dtype={given('mu_dtype')} with b1=0: there is no first moment to store, drop "
            "mu_dtype or set b1 above 0."
        )
    graft, graft_b2 = given("graft"), given("graft_b2")
    if graft_b2 is not None and graft not in ("adam", "rmsprop"):
        raise ValueError(
            f"graft_b2={graft_b2} with graft={graft!r}: only 'adam' and 'rmsprop' have that decay, "
            "choose one of them or drop graft_b2."
        )
    every = given("every")
    if is_number(every) and every > 1:
        _check_cutoff_of_old_roots(every, options)
    factor_eps, rtol = given("factor_eps"), given("rtol", 0.0)
    if factor_eps is not None and not is_off(factor_eps) and not is_off(rtol):
        raise ValueError(
            f"factor_eps={factor_eps} with rtol={rtol}: damping lifts the null directions that "
            "truncation is to remove, drop factor_eps or set rtol=0.0."
        )


def _check_cutoff_of_old_roots(every: Any, options: Mapping[str, Any]) -> None:
    solver = options.get("solver")
    named = isinstance(solver, str)
    rtol, atol = (
        options.get(name) if named else getattr(solver, name, None) for name in ("rtol", "atol")
    )
    why = (
        f"with every={every}: roots of old factors meet newer gradients, and an absolute cutoff "
        "lets noise directions through: use"
    )
    if options.get("cutoff") == "positive":
        raise ValueError(f"cutoff='positive' {why} cutoff='relative', or every=1.")
    if is_number(atol) and atol > 0:
        raise ValueError(f"atol={atol} {why} rtol, or every=1.")
    if is_off(rtol):
        raise ValueError(f"rtol={rtol}, a cutoff at 0, {why} a positive rtol, or every=1.")
