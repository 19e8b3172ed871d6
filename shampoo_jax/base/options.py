"""Options refused at construction: values out of range, and pairs that contradict each other."""

import numbers
from collections.abc import Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

WHOLE = (
    "size merge every start chunk monitor order iterations max_iterations sign_steps steps"
).split()
Scalar = float | jax.Array
Whole = int | jax.Array

AT_LEAST = {"order": 2}  # all others 1
NOT_NEGATIVE = "eps atol first_weight tolerance max_residual weight_decay lr_power".split()
BELOW_ONE = "b1 b3 rtol dampening eval_coeff".split()
UP_TO_ONE = "b2 factor_b2".split()  # 1 sums


def is_number(x: Any) -> TypeGuard[float]:
    """Whether a value is a plain number: not None, a name or an object, and not traced."""
    return isinstance(x, numbers.Real)


def is_off(value: Any) -> bool:
    """Whether an option is a plain 0."""
    return is_number(value) and value == 0


def check_range(name: str, value: Any, *, closed: bool = False) -> None:
    """Raises ValueError where a decay known now is outside [0, 1), or [0, 1] if closed."""
    interval = "[0, 1]" if closed else "[0, 1)"
    if callable(value):
        raise ValueError(
            f"{name}={value} is a function: a number in {interval} is expected here; for a "
            "schedule use shampoo_jax.inject_hyperparams."
        )
    if is_number(value) and not (0 <= value < 1 or (closed and value == 1)):
        raise ValueError(f"{name}={value} must lie in {interval}.")


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for what no function of this package can do.

    Options mean the same wherever they appear, so they are known by name. Traced values pass.

    Args:
      options: Options of a function by name, as its `locals()` at its first line, or the fields of
        an object.
    """
    for name, value in options.items():
        if name in WHOLE:
            _check_whole(name, value)
        elif name in NOT_NEGATIVE or name.endswith("damping"):
            if is_number(value) and not value >= 0:
                raise ValueError(f"{name}={value} must not be negative.")
        elif name in BELOW_ONE or name in UP_TO_ONE:
            check_range(name, value, closed=name in UP_TO_ONE)
        elif name == "exponent" and is_number(value) and not value > 0:
            raise ValueError(f"exponent={value} must be positive: 0.5 is the paper's.")
        elif name == "max_scale" and value not in ("size", "relative"):
            if not (is_number(value) and value > 0):
                raise ValueError(
                    f"max_scale={value!r}: use 'size', 'relative' or a number above 0."
                )
    _check_pairs(options)


def check_kind(name: str, value: Any, kind: type, example: str) -> None:
    """Raises ValueError for a value that is neither None nor of exactly this class."""
    if value is not None and type(value) is not kind:
        raise ValueError(f"{name}={value!r}: give a {kind.__name__}, such as {example}.")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises ValueError for a value that is none of a few."""
    if not any(value is c or (isinstance(c, str) and value == c) for c in choices):
        raise ValueError(f"{name}={value!r}: use one of {', '.join(map(repr, choices))}.")


def check_dtype(name: str, dtype: Any) -> None:
    """Raises ValueError for a storage dtype that is not None, bfloat16, float32 or float64."""
    if dtype is not None and jnp.dtype(dtype).name not in ("bfloat16", "float32", "float64"):
        raise ValueError(
            f"{name}={jnp.dtype(dtype).name}: use bfloat16 or float32; narrower ranges overflow."
        )


def check_real(path: tuple[Any, ...], leaf: Any) -> None:
    """Raises ValueError for a complex parameter, given with its key path."""
    if np.iscomplexobj(leaf):
        raise ValueError(
            f"parameter {jax.tree_util.keystr(path)} is complex ({leaf.dtype}): Shampoo's factors "
            "are real. Wrap the transformation in optax.contrib.split_real_and_imaginary."
        )


class Checked:
    """Dataclass whose fields are refused like options of their names."""

    def __post_init__(self) -> None:
        """Raises ValueError for a field out of range."""
        check_options(vars(self))


def _check_whole(name: str, value: Any) -> None:
    if value is None or isinstance(value, jax.Array):
        return
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a whole number.")
    if value < AT_LEAST.get(name, 1):
        raise ValueError(f"{name}={value} must be at least {AT_LEAST.get(name, 1)}.")


def _check_pairs(options: Mapping[str, Any]) -> None:
    for name, purpose in (("b3", "mix in"), ("mu_dtype", "store")):
        value = options.get(name)
        if is_off(options.get("b1")) and value is not None and not is_off(value):
            raise ValueError(
                f"{name}={value} with b1=0: there is no first moment to {purpose}, drop {name} or "
                "set b1 above 0."
            )
    every, solver = options.get("every"), options.get("solver")
    rtol, atol = getattr(solver, "rtol", None), getattr(solver, "atol", None)
    absolute = is_off(rtol) or is_number(atol) and atol > 0
    if absolute and is_number(every) and every > 1:
        raise ValueError(
            f"rtol={rtol}, atol={atol} with every={every}: roots of old factors meet newer "
            "gradients, and an absolute cutoff lets noise directions through: use a positive rtol "
            "alone, or every=1."
        )
