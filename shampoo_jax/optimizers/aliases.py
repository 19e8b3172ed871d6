"""Complete optimizers: each direction with decay, momentum, learning rate and routing around it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import optax

from shampoo_jax.directions import eigenbasis as eigenbasis_directions
from shampoo_jax.directions import shampoo as directions
from shampoo_jax.optimizers.routing import complete

Optimizer = Callable[..., optax.GradientTransformationExtraArgs]


def _alias(scale_by: Optimizer) -> Callable[[Optimizer], Optimizer]:
    """Decorator: the function gets the signature `(learning_rate, *scale_by's, *complete's)`.

    The keyword options of every alias are those of its direction and those of `complete`, by name
    and default, so `inspect.signature`, and with it `optax.inject_hyperparams`, sees them all.
    """
    outer = dict(list(inspect.signature(complete).parameters.items())[1:])
    inner = dict(inspect.signature(scale_by).parameters)
    for shared in ("nonfinite", "placement"):
        inner.pop(shared)
    rate = outer.pop("learning_rate")
    parameters = sorted([rate, *inner.values(), *outer.values()], key=lambda p: p.kind)
    signature = inspect.Signature(
        parameters, return_annotation=optax.GradientTransformationExtraArgs
    )

    def decorate(function: Optimizer) -> Optimizer:
        @functools.wraps(function)
        def build(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
            options = signature.bind(*args, **kwargs).arguments
            learning_rate = options.pop("learning_rate")
            around = {name: options.pop(name) for name in list(options) if name in outer}
            if around.get("nonfinite") == "skip_blocks":
                options["nonfinite"] = "skip_blocks"
            placement = around.get("placement")
            if placement is not None and around.get("momentum") is not None:
                placement = placement.split_out  # or updates would be gathered for it and after it
            direction = scale_by(**options, placement=placement)
            return complete(direction, learning_rate, **around)

        build.__signature__ = signature  # type: ignore[attr-defined]
        return build

    return decorate


@_alias(directions.scale_by_shampoo)
def shampoo(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """Shampoo on matrices, AdamW on everything else.

    The learning rate first, then the options of `scale_by_shampoo` and `complete` by name. With
    Adam grafting, start from AdamW's learning rate.

    Multiplying every gradient by a constant changes nothing beyond rounding, with the exceptions
    that `scale_by_shampoo` names.

    Example:
      >>> import jax, jax.numpy as jnp, optax, shampoo_jax
      >>> tx = shampoo_jax.shampoo(learning_rate=0.1, weight_decay=0.01)
      >>> params = {"w": jnp.eye(4), "bias": jnp.zeros(4)}
      >>> state = tx.init(params)
      >>> def loss(p):
      ...     return jnp.sum((p["w"] @ jnp.arange(4.0) + p["bias"] - 1.0) ** 2)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(40):
      ...     params, state = step(params, state)
      >>> bool(loss(params) < 0.1)
      True
    """


@_alias(eigenbasis_directions.scale_by_soap)
def soap(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """SOAP on matrices, AdamW on everything else.

    The learning rate first (3e-3 in the paper), then the options of `scale_by_soap` and `complete`
    by name; `eps`, the paper's, is on the scale of the gradients.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.soap(3e-3, every=10, weight_decay=0.01)
    """


@_alias(eigenbasis_directions.scale_by_kl_shampoo)
def kl_shampoo(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """KL-Shampoo on matrices, AdamW on everything else.

    The learning rate first, then the options of `scale_by_kl_shampoo` and `complete` by name.
    Not for a loss summed over tokens, see there.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.kl_shampoo(1e-3, weight_decay=0.01)
    """


@_alias(eigenbasis_directions.scale_by_kl_soap)
def kl_soap(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """KL-SOAP on matrices, AdamW on everything else.

    The learning rate first, then the options of `scale_by_kl_soap` and `complete` by name.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.kl_soap(1e-3, weight_decay=0.01)
    """


@_alias(directions.scale_by_one_sided_shampoo)
def one_sided_shampoo(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """One-sided Shampoo (ASGO) on matrices, AdamW on everything else.

    The learning rate first, then the options of `scale_by_one_sided_shampoo` and `complete` by
    name.

    Example:
      >>> import shampoo_jax
      >>> tx = shampoo_jax.one_sided_shampoo(1e-3, side="right", weight_decay=0.1)
    """
