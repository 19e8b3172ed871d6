"""Options that may change while training: traced by `inject_hyperparams`, all others static."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.eager import compiled
from shampoo_jax.base.options import check_dtype, check_options

Factory = Callable[..., optax.GradientTransformation]

# Options that enter the arithmetic only. Every other option of this package decides what is
# computed or what a state looks like.
TRACED = frozenset(
    "learning_rate b1 b2 b3 eps factor_b2 first_weight every weight_decay peak_lr momentum "
    "dampening decay eval_coeff lr_power ratio outward inward share others_rate".split()
)


def inject_hyperparams(
    factory: Factory, static_args: Iterable[str] = (), hyperparam_dtype: Any = jnp.float32
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """`optax.inject_hyperparams` that knows which options of this package can be traced.

    Numbers and schedules among learning rates, decays, eps, momentum, shares and `every` become
    entries of `state.hyperparams`, to be changed between steps without compiling again; all other
    options stay what they are. An option that is left at a default of None or 0 is off and is not
    traced: name it to change it later.

    Args:
      factory: `shampoo`, `scale_by_soap`, `invert_roots` or any other function of this package that
        returns a transformation.
      static_args: Further options not to be traced.
      hyperparam_dtype: Of traced floats. Optax's default, the dtype of the parameters, would round
        a decay of 0.999 to 1 for bfloat16 parameters.

    Returns:
      A function with the signature of `factory` that also takes schedules for traced options.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> tx = shampoo_jax.inject_hyperparams(shampoo_jax.shampoo)(0.1, b1=0.9, root_dtype=None)
      >>> state = tx.init({"w": jnp.ones((3, 2))})
      >>> state.hyperparams["learning_rate"] = jnp.asarray(0.05)
      >>> "b2" in state.hyperparams, "root_dtype" in state.hyperparams
      (True, False)
    """
    check_options({"factory": factory})
    check_dtype("hyperparam_dtype", hyperparam_dtype)
    signature = inspect.signature(factory)
    never = {static_args} if isinstance(static_args, str) else set(static_args)
    for name in never - signature.parameters.keys():
        raise ValueError(f"static_args={name!r}: use one of {', '.join(signature.parameters)}.")

    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            factory(*args, **kwargs)  # answers a misspelt keyword with the nearest
            raise
        on = {n for n, p in signature.parameters.items() if n in given or p.default}
        static = (set(signature.parameters) - (TRACED & on)) | never
        wrapped = optax.inject_hyperparams(factory, static, hyperparam_dtype)
        # Optax's update builds the optimizer anew, whose own program would be compiled every time.
        tx = wrapped(*args, **kwargs)
        return tx._replace(update=compiled(tx.update))

    return build


def check_static(options: Mapping[str, Any]) -> None:
    """Raises ValueError where an option that cannot be traced is a tracer or any other jax array.

    Args:
      options: Options of a factory by name, as its `locals()` at its first line.
    """
    for name, value in options.items():
        if name not in TRACED and isinstance(value, jax.Array):
            raise ValueError(
                f"{name}={value} is a static option, it decides what is computed: give it as a "
                "Python value. With optax.inject_hyperparams name it in static_args, or use "
                "shampoo_jax.inject_hyperparams, which does so."
            )


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options themselves, once none is traced that cannot be and none out of range."""
    check_static(options)
    check_options(options)
    return options
