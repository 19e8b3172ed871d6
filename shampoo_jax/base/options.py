"""Options refused at construction: values out of range, and pairs that contradict each other.

An option means the same wherever it appears: `OPTIONS` says by name what it may be.
"""

import dataclasses
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

Scalar = float | jax.Array
Whole = int | jax.Array
Check = Callable[[str, Any], None]  # of the name and the value of an option

LAST_STEP = 2**31 - 1  # steps are counted in int32


def is_number(x: Any) -> TypeGuard[float]:
    """Whether a value is a plain number: not None, a name or an object, and not traced."""
    return isinstance(x, numbers.Real)


def is_off(value: Any) -> bool:
    """Whether an option is a plain 0."""
    return is_number(value) and value == 0


def is_transform(x: Any) -> bool:
    """Whether a value has the two functions of an Optax transformation; a class has not."""
    functions = (getattr(x, name, None) for name in ("init", "update"))
    return not isinstance(x, type) and all(map(callable, functions))


def refuse(name: str, value: Any, message: str) -> None:
    """Raises ValueError for this value of an option; classes and functions go by their names."""
    raise ValueError(f"{name}={getattr(value, '__qualname__', None) or repr(value)}{message}.")


@dataclasses.dataclass(frozen=True)
class Number:
    """A number of a range. An array of one number passes unread: it may be traced.

    Attributes:
      fits: Whether a plain number is in the range.
      range: In words, as a message goes on.
      hint: What to give instead.
      schedule: Whether a function of the step will do.
    """

    fits: Callable[[float], bool]
    range: str
    hint: str
    schedule: bool = False

    def __call__(self, name: str, value: Any) -> None:
        """Raises ValueError for what is no such number."""
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value.item()
        if isinstance(value, (jax.Array, np.ndarray)):
            if value.ndim:
                raise ValueError(f"{name} has shape {value.shape}: give one number; {self.hint}.")
        elif callable(value) and not isinstance(value, type):
            if not self.schedule:
                inject = "for a schedule use shampoo_jax.inject_hyperparams"
                refuse(name, value, f" is a function, not a number, which {self.range}: {inject}")
        elif isinstance(value, bool) or not is_number(value):
            refuse(name, value, f" is no number, which {self.range}: {self.hint}")
        elif not self.fits(value):
            raise ValueError(f"{name}={value} {self.range}: {self.hint}.")

    def but(self, hint: str) -> "Number":
        """The same range with a hint of its own."""
        return dataclasses.replace(self, hint=hint)


BELOW_ONE = Number(lambda x: 0 <= x < 1, "must lie in [0, 1)", "0.9 averages over 10, 0 over one")
UP_TO_ONE = Number(lambda x: 0 <= x <= 1, "must lie in [0, 1]", "0.95 averages over 20, 1 sums")
SHARE = Number(lambda x: 0 < x <= 1, "must lie in (0, 1]", "1 is the whole")
NOT_NEGATIVE = Number(lambda x: 0 <= x < math.inf, "must not be negative or infinite", "0 is none")
POSITIVE = Number(lambda x: 0 < x < math.inf, "must be positive and finite", "0.5 is the root")
RATE = dataclasses.replace(NOT_NEGATIVE, schedule=True)


@dataclasses.dataclass(frozen=True)
class WholeNumber:
    """A whole number, at least `least` and at most `most`; an array passes if `traced`."""

    hint: str
    least: int = 1
    most: float = math.inf
    traced: bool = False

    def __call__(self, name: str, value: Any) -> None:
        """Raises ValueError for what is no such number."""
        if self.traced and isinstance(value, jax.Array) and value.ndim == 0:
            return
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            refuse(name, value, f" must be a whole number: {self.hint}")
        for fits, bound in (
            (value >= self.least, f"at least {self.least}"),
            (value <= self.most, f"at most {self.most}"),
        ):
            if not fits:
                raise ValueError(f"{name}={value} must be {bound}: {self.hint}.")


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError for what is neither True nor False: anything else would count as one."""
    if not isinstance(value, (bool, np.bool_)):
        refuse(name, value, " must be True or False, as Python knows them before any step")


def check_exponent(name: str, value: Any) -> None:
    """Raises ValueError for what is neither a positive number nor a function of dimensions."""
    if not callable(value) or isinstance(value, type):
        POSITIVE(name, value)


def check_range(name: str, value: Any, *, closed: bool = False) -> None:
    """Raises ValueError where a decay known now is outside [0, 1), or [0, 1] if closed."""
    (UP_TO_ONE if closed else BELOW_ONE)(name, value)


def check_kind(name: str, value: Any, kind: type, example: str) -> None:
    """Raises ValueError for a value that is neither None nor of exactly this class."""
    if value is not None and type(value) is not kind:
        refuse(name, value, f": give a {kind.__name__}, such as {example}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises ValueError for a value that is none of a few."""
    if not any(value is c or (isinstance(c, str) and value == c) for c in choices):
        refuse(name, value, f": use one of {', '.join(map(repr, choices))}")


def check_dtype(name: str, dtype: Any) -> None:
    """Raises ValueError for a storage dtype that is not None, bfloat16, float32 or float64."""
    if dtype is None:
        return
    try:
        given = jnp.dtype(dtype).name
    except TypeError:  # no dtype at all
        given = "object"
    given = repr(dtype) if given == "object" else given
    if given not in ("bfloat16", "float32", "float64"):
        raise ValueError(f"{name}={given}: use bfloat16 or float32; narrower ranges overflow.")


def check_transform(name: str, value: Any) -> None:
    """Raises ValueError for what is no Optax transformation."""
    if not is_transform(value):
        call = f": call it, {value.__name__}(...)" if inspect.isroutine(value) else ""
        refuse(name, value, f" is no Optax transformation, which has init and update{call}")


def a_function(of: str) -> Check:
    """The check of an option that is a function; raises ValueError for what is none."""

    def check(name: str, value: Any) -> None:
        if not callable(value) or isinstance(value, type):
            refuse(name, value, f" must be a function of {of}")

    return check


def one_of(*choices: Any) -> Check:
    """`check_choice` of these."""
    return lambda name, value: check_choice(name, value, choices)


def _check_max_scale(name: str, value: Any) -> None:
    named = isinstance(value, str) and value in ("size", "relative")
    if isinstance(value, bool) or not (named or (is_number(value) and value > 0)):
        refuse(name, value, ": use 'size', 'relative' or a number above 0")


# What an option may be, those of one line by the same.
_SHARED: dict[str, Check] = {
    "bias_correction weighted normalize canonical descending before stagger skip_first reorder "
    "scaled nesterov scale_by_nuclear_norm eps_hat cut_all": check_flag,
    "b1 dampening": BELOW_ONE,
    "b3": BELOW_ONE.but("None means b1"),
    "rtol": BELOW_ONE.but("0 cuts nothing off, None means d * eps of the dtype"),
    "eval_coeff": BELOW_ONE.but("None means 0.9"),
    "b2 factor_b2": UP_TO_ONE,
    "train_coeff": SHARE,
    "eps atol damping relative_damping absolute_damping floor": NOT_NEGATIVE,
    "tolerance": NOT_NEGATIVE.but("1e-6, say; 0 is met by nothing"),
    "first_weight": UP_TO_ONE.but("None means 1 - b2"),
    "lr_power": NOT_NEGATIVE.but("None means 2"),
    "max_residual": Number(lambda x: x >= 0, "must not be negative", "math.inf accepts every root"),
    "peak_lr": POSITIVE.but("weight decay is divided by it"),
    "others_rate": NOT_NEGATIVE.but("None means 4, or 1 where updates are not of Adam's size"),
    "first_eigenvalue": POSITIVE.but("0.1 is the authors'"),
    "weight_decay": RATE,
    "learning_rate": RATE.but("1e-3, say, or a schedule; to go uphill negate the gradients"),
    "exponent": check_exponent,
    "max_scale": _check_max_scale,
    "every": WholeNumber("1 is every step", most=LAST_STEP, traced=True),
    "start": WholeNumber("None means every", most=LAST_STEP, traced=True),
    "monitor": WholeNumber("None records nothing", most=LAST_STEP),
    "size": WholeNumber("None leaves parameters whole"),
    "block_size": WholeNumber("1024, say"),
    "merge": WholeNumber("2 keeps matrices, None merges nothing"),
    "chunk": WholeNumber("None takes all at once"),
    "order": WholeNumber("2 is Newton's", least=2),
    "iterations": WholeNumber("1 is SOAP's"),
    "max_iterations": WholeNumber("100, say"),
    "sign_steps": WholeNumber("3, say"),
    "factory": a_function("options giving a transformation: shampoo_jax.shampoo"),
    "steps": WholeNumber("5 are Muon's"),
    "when": one_of("before", "after"),
    "sort": one_of("before", "after", None),
    "semantics": one_of("cut", "clip"),
    "implementation": one_of("qr", "jacobi", "qdwh", None),
    "direction inner inner_roots magnitude others": check_transform,
    "preconditioned": a_function("(path, leaf) giving True or False: lambda path, leaf: True"),
    "target": a_function("a parameter giving a norm: jnp.linalg.norm"),
    "rule": a_function("(path, leaf): lambda path, leaf: 1.0"),
}
OPTIONS: dict[str, Check] = {n: check for names, check in _SHARED.items() for n in names.split()}

# Where None has a meaning of its own.
OPTIONAL = frozenset(
    "reorder b3 rtol eval_coeff factor_b2 first_weight lr_power peak_lr start monitor size merge "
    "chunk others others_rate preconditioned".split()
)


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for what no function of this package can do.

    Args:
      options: Options of a function by name, as its `locals()` at its first line, or the fields of
        an object. Names that are not in `OPTIONS` are left to the function.
    """
    for name, value in options.items():
        if name in OPTIONS and not (value is None and name in OPTIONAL):
            OPTIONS[name](name, value)
    _check_pairs(options)


def check_entries(options: Mapping[str, Any]) -> None:
    """`check_options` of functions on arrays, whose options may have one entry a matrix."""
    check_options({name: value for name, value in options.items() if np.ndim(value) == 0})


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
