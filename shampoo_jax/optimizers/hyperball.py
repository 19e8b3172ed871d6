"""Steps of a fixed size, and matrices of a fixed norm: the hyperball constraint."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import NOT_NEGATIVE, check_options
from shampoo_jax.base.paths import KeyPath, name_of

Array = jax.Array


def scale_to_norm(target: Callable[[Array], Any]) -> optax.GradientTransformation:
    """Gives the update of every parameter a Frobenius norm that the parameter decides.

    `U <- U * target(W) / |U|_F`; 0 where `U` is 0.

    Args:
      target: Function of the parameter `W` (or its shape, if that is all it reads) giving the norm
        of its update. `lambda w: w.shape[-1] ** 0.5` is the root of the number of outputs of an
        (in, out) kernel (modded-nanogpt, pull request 327); `jnp.linalg.norm` makes updates
        relative to the parameter.

    Returns:
      A transformation without state that needs `params`. A parameter has one norm, whatever its
      axes: give stacked layers separately.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> tx = shampoo_jax.scale_to_norm(lambda w: w.shape[-1] ** 0.5)
      >>> params = {"w": jnp.zeros((1, 4))}
      >>> updates, _ = tx.update({"w": jnp.full((1, 4), 7.0)}, tx.init(params), params)
      >>> updates["w"].tolist()
      [[1.0, 1.0, 1.0, 1.0]]
    """
    check_options({"target": target})

    def scale(update: Array, parameter: Array) -> Array:
        return _at_length(update, target(parameter)).astype(update.dtype)

    return of_updates_and_params(scale)


def keep_norm() -> optax.GradientTransformation:
    """Replaces a step by one that ends at the parameter's present Frobenius norm.

    `D <- (W + D) * |W|_F / |W + D|_F - W`, so that `W + D` has the norm of `W`, up to rounding. A
    parameter that is 0 stays 0. To be placed last in a chain, after the learning rate.

    Returns:
      A transformation without state that needs `params`.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> tx = shampoo_jax.keep_norm()
      >>> w = jnp.array([3.0, 0.0])
      >>> step, _ = tx.update(jnp.array([0.0, 4.0]), tx.init(w), w)
      >>> (w + step).round(2).tolist()  # (3, 4), brought back from norm 5 to norm 3
      [1.8, 2.4]
    """

    def keep(step: Array, parameter: Array) -> Array:
        moved = _at_length(parameter + step, _norm(parameter))
        return (moved - parameter).astype(step.dtype)

    return of_updates_and_params(keep)


def keep_radius(floor: float | Array = 1e-8) -> optax.GradientTransformation:
    """Replaces a step by one that ends where its part along the parameter alone would have ended.

    `D <- (W + D) * r / |W + D|_F - W` with `r = max(|W|_F + <D, W> / |W|_F, floor)`: the norm
    follows the radial part of the step, not the length that a turn adds. To be placed last in a
    chain, after the learning rate, which `radial_brake` may have gone before.

    Args:
      floor: Least norm, on the scale of parameters; a parameter that is 0 gets it in its first
        step.

    Returns:
      A transformation without state that needs `params`. A parameter has one norm, whatever its
      axes.

    Raises:
      ValueError: A negative floor.

    Source: modded-nanogpt track 3, results #44 to #46, with this floor.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> tx = shampoo_jax.keep_radius()
      >>> w = jnp.array([4.0, 0.0])
      >>> step, _ = tx.update(jnp.array([-1.0, 4.0]), tx.init(w), w)
      >>> (w + step).round(2).tolist()  # (3, 4), brought back from norm 5 to norm 3
      [1.8, 2.4]
    """
    NOT_NEGATIVE("floor", floor)

    def keep(step: Array, parameter: Array) -> Array:
        d, w = wide(step), wide(parameter)
        own = _norm(w)
        length = jnp.maximum(own, floor)
        direction = w / jnp.where(length > 0, length, 1.0)
        along = jnp.sum(d * direction)
        across = jnp.sum((d - along * direction) ** 2)
        radius = length + along
        # r / |W + D| is sqrt(1 - q): by two norms it would have the rounding of their long sums.
        total = radius**2 + across
        q = across / jnp.where(total > 0, total, 1.0)
        fine = d - q / (1 + jnp.sqrt(1 - q)) * (w + d)
        floored = _at_length(w + d, jnp.maximum(radius, floor)) - w
        held = jnp.where((own >= floor) & (radius >= floor) & (total > 0), fine, floored)
        return held.astype(step.dtype)

    return of_updates_and_params(keep)


def hyperball(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Takes the place of `optax.scale_by_learning_rate`, and holds each parameter's norm.

    `W' = W - lr * |W|_F * U / |U|_F`, then `W <- W' * |W|_F / |W'|_F`: parameters stay on the
    sphere of their initial Frobenius norm and move by the angle that the learning rate says, for
    small ones. Weight decay would change nothing. A parameter that starts at 0 never moves.

    Source: modded-nanogpt track 3, results 4 (AdamH), 5 (MuonH), 19 (KL-SOAP-H) and 27 (SOAP-H).

    Args:
      learning_rate: Number or schedule; the size of a step relative to the parameter.

    Returns:
      A transformation that needs `params`; its only state is the schedule's step count.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> tx = optax.chain(shampoo_jax.scale_by_soap(), shampoo_jax.hyperball(0.018))
      >>> params = {"w": jnp.eye(2)}
      >>> updates, _ = tx.update({"w": jnp.ones((2, 2))}, tx.init(params), params)
      >>> round(float(jnp.linalg.norm(params["w"] + updates["w"])) ** 2, 4)
      2.0
    """
    check_options({"learning_rate": learning_rate})
    return optax.chain(
        scale_to_norm(_norm), optax.scale_by_learning_rate(learning_rate), keep_norm()
    )


def _norm(x: Array) -> Array:
    return jnp.linalg.norm(wide(x))


def wide(x: Array) -> Array:
    """An array in float32, or in its wider dtype."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _at_length(x: Array, length: Any) -> Array:
    """X scaled to a Frobenius norm; 0 stays 0."""
    norm = _norm(x)
    return x * jnp.where(norm > 0, length / jnp.where(norm > 0, norm, 1.0), 0.0)


def of_updates_and_params(f: Callable[[Array, Array], Array]) -> optax.GradientTransformation:
    """A transformation without state of `f(update, parameter)`; None stays None."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("params=None: norms are those of parameters, pass them to update.")
        return jax.tree_util.tree_map_with_path(one, updates, params, is_leaf=_is_none), state

    def one(path: KeyPath, update: Array | None, parameter: Array) -> Array | None:
        if update is None:
            return None
        if jnp.shape(update) != jnp.shape(parameter):
            raise ValueError(
                f"parameter {name_of(path)!r} has shape {jnp.shape(parameter)}, its update "
                f"{jnp.shape(update)}: pass updates and parameters of one tree."
            )
        return f(update, parameter)

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _is_none(x: Any) -> bool:
    return x is None
