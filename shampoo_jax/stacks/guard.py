"""What reaches the optimizer: gradients that are missing, narrow or not finite, dealt with once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

from shampoo_jax.base.eager import are_arrays
from shampoo_jax.base.options import check_options
from shampoo_jax.base.paths import nodes_of
from shampoo_jax.blocks.blocks import as_array
from shampoo_jax.stacks.incoming import check_arrays, check_gradients, check_state, trained
from shampoo_jax.stacks.missing import Paths, drop, fill_missing, restore
from shampoo_jax.stacks.placement import laid_as

Array = jax.Array


class Guarded(optax.GradientTransformationExtraArgs):
    """A transformation whose input is dealt with by `guard`.

    Attributes:
      inner: The same transformation without, for whoever guards a larger one.
      design: What it was built from, for `explain`; None where that is not known.
    """

    inner: optax.GradientTransformationExtraArgs
    design: Any = None


def guard(inner: optax.GradientTransformation, design: Any = None) -> Guarded:
    """Gives any transformation complete, finite gradients in float32 or wider.

    - A gradient that is None leaves its parameter and its state alone: `inner` sees zeros, named in
      the extra argument `absent` that `blocked` understands; afterwards every state leaf that
      belongs to the parameter (its path ends with the parameter's, no longer one's, and it has its
      shape) is put back, and the update is None. Step counts advance for all parameters alike, as
      in Meta's distributed_shampoo. Whether a gradient is missing is part of the tree's structure,
      so each pattern compiles once.
    - In a step with a gradient that is NaN, infinite, or so large that a sum of squares could
      overflow, updates are zero and all state stays as it was: one such gradient would make a
      factor infinite for ever. It is `optax.apply_if_finite` that never gives up.
    - `inner` computes in float32 or wider; updates have the dtype of the gradients.
    - The extra argument `further`, trees like that of the gradients (see `blocked`), is treated as
      they are.

    Args:
      inner: The whole optimizer, or any transformation.
      design: What `explain` is told.

    Returns:
      The transformation. Its state is an `optax.ApplyIfFiniteState` around that of `inner`;
      `total_notfinite` counts the skipped steps, see `check_finite`.

    Raises:
      ValueError: A parameter or gradient whose dtype is no floating point number of 16 bits or
        more; in `update`, a gradient of another name or shape than its parameter, a float64 one
        for a narrower state, or a state that was made for other parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = guard(optax.adam(0.1))
      >>> params = {"seen": jnp.ones(2), "unseen": jnp.ones(2)}
      >>> grads = {"seen": jnp.ones(2), "unseen": None}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates["seen"].round(2).tolist(), updates["unseen"]
      ([-0.1, -0.1], None)
      >>> bad = {"seen": jnp.ones(2), "unseen": jnp.array([jnp.nan, 0.0])}
      >>> updates, state = tx.update(bad, state, params)
      >>> updates["seen"].tolist(), int(state.total_notfinite)
      ([0.0, 0.0], 1)
    """
    check_options({"inner": inner})
    tx = optax.with_extra_args_support(inner)

    def init(params: Any) -> optax.ApplyIfFiniteState:
        check_arrays(params, "parameter", whole=True)
        in_a_row, total = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        inner_state = tx.init(widen(trained(params)))
        return optax.ApplyIfFiniteState(in_a_row, jnp.array(True), total, inner_state)

    def step(absent: Paths, updates: Any, state: Any, params: Any, extra: Any) -> tuple[Any, Any]:
        further = extra.get("further", {})
        known = dict(extra, further=widen(further)) if further else dict(extra)
        known |= {"absent": absent} if absent else {}

        # The branch gets the gradients themselves: as checked they would be copied for it.
        def take() -> tuple[Any, Any]:
            new, inner_state = tx.update(widen(updates), state.inner_state, widen(params), **known)
            if absent:
                inner_state = restore(inner_state, state.inner_state, params, absent)
            return _as_parameters_lie(cast_like(new, updates), params), inner_state

        def skip() -> tuple[Any, Any]:
            return _zeros(updates, params, take), state.inner_state

        ok = _usable(jax.tree.leaves((updates, further)))
        new, inner_state = jax.lax.cond(ok, take, skip)
        in_a_row = jnp.where(ok, 0, optax.safe_increment(state.notfinite_count))
        total = jnp.where(ok, state.total_notfinite, optax.safe_increment(state.total_notfinite))
        return new, optax.ApplyIfFiniteState(in_a_row, ok, total, inner_state)

    # Outside of jit, too, a step is one program, compiled once; inside it is part of the other.
    compiled = jax.jit(step, static_argnums=0)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        check_gradients(updates, extra.get("further", {}))
        check_state(state, updates)
        filled, own, params = fill_missing(updates, params, functools.partial(_owns, tx, state))
        absent = own | extra.pop("absent", frozenset())
        try:
            run = compiled if are_arrays(extra) else step
            new, state = run(absent, filled, state, params, extra)
        except Exception as error:
            _check_owner(tx, state, updates if params is None else params, error)
            raise
        return (drop(new, own) if own else new), state

    guarded = Guarded(init, update)
    guarded.inner, guarded.design = tx, design
    return guarded


def _as_parameters_lie(updates: Any, params: Any) -> Any:
    """Updates that can be added to parameters, of whose layout a placement may not know."""
    if jax.tree.structure(params) != jax.tree.structure(updates):
        return updates
    return jax.tree.map(lambda u, p: laid_as(u, jax.typeof(p).sharding), updates, params)


def _check_owner(tx: Any, state: Any, params: Any, error: Exception) -> None:
    """Raises ValueError where an error comes from a state that was made for other parameters."""
    if any(x is None for x in jax.tree.leaves(params, is_leaf=lambda x: x is None)):
        return  # gradients without the parameters, which alone could tell
    try:
        own = _owns(tx, state, params)
    except Exception:
        return
    if not own:
        raise ValueError(
            "the optimizer state belongs to other parameters, of other names, shapes or number, or "
            "to another optimizer: init again, or carry it over by state_to_tree and tree_to_state"
            "; where vmap made it, update under vmap as well."
        ) from error


def _owns(tx: Any, state: Any, params: Any) -> bool:
    """Whether a state has the form of one that is made for these parameters."""
    fresh = jax.eval_shape(tx.init, params)
    (made, given), (held, found) = jax.tree.flatten(fresh), jax.tree.flatten(state.inner_state)
    return given == found and [x.shape for x in made] == [*map(np.shape, held)]


def _zeros(updates: Any, params: Any, take: Callable[[], tuple[Any, Any]]) -> Any:
    """Updates of a skipped step; they lie as parameters do, which gradients need not."""
    like = params
    if jax.tree.structure(params) != jax.tree.structure(updates):
        axes = {a for g in jax.tree.leaves(updates) for a in jax.typeof(g).sharding.mesh.axis_types}
        # On Explicit axes how an update lies is part of its type; without parameters it is asked.
        like = jax.eval_shape(take)[0] if AxisType.Explicit in axes else updates
    return jax.tree.map(lambda g, p: jnp.zeros_like(p, jnp.result_type(g)), updates, like)


def unguarded(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation inside of a `Guarded` one, any other as it is."""
    return tx.inner if isinstance(tx, Guarded) else tx


def _usable(gradients: list[Any]) -> Array:
    """Whether all entries are finite and no sum of their squares can overflow."""
    ok = jnp.array(True)
    for g in gradients:
        g = jnp.asarray(g)
        largest = float(jnp.finfo(jnp.promote_types(g.dtype, jnp.float32)).max)
        bound = min((largest / max(g.size, 1)) ** 0.5, float(jnp.finfo(g.dtype).max))
        ok &= (jnp.abs(g) <= bound).all()  # false for NaN
    return ok


def widen(tree: Any) -> Any:
    """Casts every array to float32, or leaves it in its wider dtype."""
    leaves, structure = jax.tree.flatten(tree)
    for i, x in enumerate(leaves):
        x = as_array(x)
        leaves[i] = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return structure.unflatten(leaves)


def cast_like(tree: Any, like: Any) -> Any:
    """Casts every array of `tree` to the dtype of its counterpart in `like`."""
    leaves, structure = jax.tree.flatten(tree)
    for i, x in enumerate(structure.flatten_up_to(like)):
        leaves[i] = leaves[i].astype(jnp.asarray(x).dtype)
    return structure.unflatten(leaves)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` in float32 or wider, with its state, and returns updates in the incoming dtype.

    Stock parts add an array-valued hyperparameter times a bfloat16 array in float32 and hand that
    on, so both updates and state change dtype after the first step; here they keep it. `guard` does
    it to a whole optimizer.

    Args:
      inner: Any Optax transformation.

    Returns:
      The transformation.
    """
    tx = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return tx.init(widen(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        new, state = tx.update(widen(updates), state, widen(params), **extra)
        return cast_like(new, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def check_finite(opt_state: Any) -> None:
    """Raises where gradients were not finite and steps were skipped, for a training loop.

    To be called outside jit, as often as a stop may be late: it waits for the step.

    Args:
      opt_state: State of any optimizer that counts what it skips: those of this package,
        `optax.apply_if_finite`, nested in whatever wrappers; of a vmapped one all copies count.

    Raises:
      FloatingPointError: Steps were skipped since the state was made; the message says how many.
      ValueError: The state counts nothing.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> tx = shampoo_jax.shampoo(0.1)
      >>> params = {"w": jnp.ones((2, 2))}
      >>> _, state = tx.update({"w": jnp.full((2, 2), jnp.nan)}, tx.init(params), params)
      >>> shampoo_jax.check_finite(state)
      Traceback (most recent call last):
      FloatingPointError: gradients were not finite: 1 step was skipped so far.
    """
    states = [node for _, node in nodes_of(optax.ApplyIfFiniteState, opt_state)]
    if not states:
        raise ValueError(
            "this optimizer state counts no skipped gradients: use an optimizer of this package, "
            "or wrap yours in optax.apply_if_finite."
        )
    for state in states:  # which grows by those inside of others
        states += [node for _, node in nodes_of(optax.ApplyIfFiniteState, state.inner_state)]
    skipped = sum(int(np.sum(state.total_notfinite)) for state in states)
    if skipped:
        times = "1 step was" if skipped == 1 else f"{skipped} steps were"
        raise FloatingPointError(f"gradients were not finite: {times} skipped so far.")
