"""Iterate averaging: train between a fast iterate and its average, evaluate the average."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import check_choice, check_options, check_transform
from shampoo_jax.base.paths import nodes_of
from shampoo_jax.optimizers.lookahead import EmaNesterovState
from shampoo_jax.optimizers.tail import TailAverageState
from shampoo_jax.optimizers.weight_decay import Scalar, ScalarOrSchedule, value_at
from shampoo_jax.stacks.guard import cast_like, guard, unguarded, widen

Array = jax.Array


class AveragingState(NamedTuple):
    """State of `averaging`."""

    count: Array  # int32[], steps taken
    train_coeff: Array  # float32[], read again by `eval_params`
    weight_sum: Array  # float32[], sum of lr^lr_power so far; 0 where kind is primal
    z: Any  # the fast iterate, shaped like the parameters, float32 or wider
    inner: Any
    decay: Any

    def evaluated(self, params: Any) -> Any:
        """The average `x`."""
        return _average(self, params)


def averaging(
    inner: optax.GradientTransformation,
    kind: str = "primal",
    *,
    learning_rate: ScalarOrSchedule,
    train_coeff: Scalar = 0.8,
    eval_coeff: Scalar | None = None,
    lr_power: Scalar | None = None,
    decay: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lets `inner` drive a fast iterate `z`; gradients are taken near the average `x` of its path.

    With `U` the complete update of `inner` (learning rate and sign included), one step is

      `z = (1 - lr * alpha) z + U`
      `x = c x + (1 - c) z`
      `y = train_coeff x + (1 - train_coeff) z`

    The parameters that the caller holds, differentiates at and updates are `y`; `x` is what to
    evaluate, see `eval_params`; only `z` is stored. All three start at the same point. Kinds:

      `"primal"`: `c = eval_coeff`, an exponential average (Generalized Primal Averaging,
        arXiv:2512.17131);
      `"schedule_free"`: `c = 1 - lr(t)^p / sum_{i<=t} lr(i)^p`, the average of all iterates
        weighted by the learning rate (Defazio et al. 2024, arXiv:2405.15682).

    As in the reference, decay acts on `z`, and `x` is recovered from `y` and the decayed `z`.
    `optax.contrib.schedule_free` weights by the largest learning rate so far instead and leaves
    decay to the wrapped optimizer, which applies it at `y`; decay inside `inner` does that here.

    A step with any non-finite gradient is skipped as a whole, see `guard`: `y`, `z`, the decay and
    all counts stay, so `inner` and the average agree on the step of a schedule. A gradient that is
    None leaves its parameter, its `z` and their state alone.

    Args:
      inner: Optimizer or chain that ends in the learning rate, without momentum: averaging takes
        its place.
      kind: `"primal"` or `"schedule_free"`.
      learning_rate: The one that `inner` applies: number, array or schedule of the step, counted
        from 0. It weights the average and scales decay.
      train_coeff: Share of `x` in `y`, in (0, 1]. It has to stay constant: `x` is computed from it.
      eval_coeff: `c` of primal averaging, in [0, 1); None means 0.9.
      lr_power: `p` of schedule-free averaging, not negative; None means 2.
      decay: Transformation that adds `alpha * params`, such as `optax.add_decayed_weights(0.1)` or
        the `after` of `decay_parts`; it is shown `z`.

    Returns:
      A transformation that needs `params`. Updates keep the dtype of the incoming ones. The state
      is an `AveragingState` inside `optax.ApplyIfFiniteState`; it holds `z` in float32 or wider,
      since steps of a small learning rate vanish in bfloat16; the average profits from it in full
      only where parameters are float32 as well.

    Raises:
      ValueError: An unknown kind, an option out of range or of the other kind, missing params.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from shampoo_jax.optimizers.averaging import averaging, eval_params
      >>> tx = averaging(optax.sgd(0.5), "schedule_free", learning_rate=0.5)
      >>> params = jnp.array(1.0)
      >>> state = tx.init(params)
      >>> for _ in range(20):
      ...     updates, state = tx.update(params, state, params)  # gradient of params^2 / 2
      ...     params = optax.apply_updates(params, updates)
      >>> bool(abs(eval_params(state, params)) < 0.1)
      True
    """
    _check_options(locals())
    inner = optax.with_extra_args_support(unguarded(inner))
    decay = optax.with_extra_args_support(decay or optax.identity())
    coeff = 0.9 if eval_coeff is None else eval_coeff
    power = 2.0 if lr_power is None else lr_power

    def init_fn(params: Any) -> AveragingState:
        # A copy even of float32 parameters: state and parameters may both be donated.
        z = jax.tree.map(lambda p: jnp.array(p, copy=True), widen(params))
        count, total = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32)
        mix = jnp.asarray(train_coeff, jnp.float32)
        return AveragingState(count, mix, total, z, inner.init(params), decay.init(z))

    def update_fn(
        updates: Any, state: AveragingState, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("averaging needs the parameters: call update(updates, state, params).")
        lr = jnp.asarray(value_at(learning_rate, state.count), jnp.float32)
        mix = jnp.asarray(train_coeff, jnp.float32)
        c, total = jnp.asarray(coeff, jnp.float32), state.weight_sum
        if kind == "schedule_free":
            c, total = _weighted(lr**power, total)
        step, inner_state = inner.update(updates, state.inner, params, **extra)
        step, y = widen(step), widen(params)
        zeros = jax.tree.map(jnp.zeros_like, state.z)
        alpha_z, decay_state = decay.update(zeros, state.decay, state.z, **extra)
        z = jax.tree.map(lambda z, a: z - lr * a, state.z, alpha_z)
        # The difference of new and old y, written so that small steps are not lost in large y.
        moved = jax.tree.map(lambda u, z, y: (1 - mix * c) * u + (1 - c) * (z - y), step, z, y)
        z, count = jax.tree.map(jnp.add, z, step), optax.safe_increment(state.count)
        state = AveragingState(count, mix, total, z, inner_state, decay_state)
        return cast_like(moved, updates), state

    return guard(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def _weighted(weight: Array, total: Array) -> tuple[Array, Array]:
    """Share of the old average in one to which a weight is added, and the new sum of weights."""
    total = total + weight
    # While a warm-up has been at 0, nothing has moved and any weight will do.
    return 1 - weight / jnp.where(total > 0, total, 1.0), total


def eval_params(state: Any, params: Any) -> Any:
    """The weights to evaluate, from the parameters that are trained, which stay as they are.

    Of `averaging` it is `x = y + (1 - 1 / train_coeff) (z - y)`, of `ema_nesterov` what the
    parameters were before they were moved ahead, and of `tail_average` the mix of these, or of the
    parameters, with the average.

    Args:
      state: Any optimizer state with one of theirs in it, however deep; several of them may share
        the parameters, as `optax.partition` lets them.
      params: The trained parameters.

    Returns:
      A tree like `params`, same dtypes. Parameters that are not averaged are returned unchanged.

    Raises:
      ValueError: `state` holds none of these, or is a stack of several, as vmap makes them.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = averaging(optax.sgd(1.0), learning_rate=1.0, train_coeff=0.5, eval_coeff=0.75)
      >>> params = jnp.array(0.0)
      >>> updates, state = tx.update(jnp.array(-8.0), tx.init(params), params)  # z = 8
      >>> params = optax.apply_updates(params, updates)
      >>> float(params), float(eval_params(state, params))  # x = z / 4, y = (x + z) / 2
      (5.0, 2.0)
    """
    states = [x for kind in EVALUATED for _, x in nodes_of(kind, state)]
    if not states:
        raise ValueError(
            f"eval_params found no AveragingState in a state of type {type(state).__name__}: pass "
            "the state of an optimizer that is wrapped in averaging(), or of a chain with "
            "ema_nesterov() or tail_average()."
        )
    for found in states:
        if jnp.ndim(found.count):
            raise ValueError(
                "the optimizer state is a stack of several, as vmap makes them: map over both, "
                "jax.vmap(eval_params)(state, params)."
            )
        params = found.evaluated(params)
    return params


# Parameters are put where they belong before anything is averaged with them.
EVALUATED = (EmaNesterovState, AveragingState, TailAverageState)


def _average(state: AveragingState, params: Any) -> Any:
    def one(z: Any, y: Any) -> Any:
        if isinstance(z, optax.MaskedNode):
            return y
        return cast_like(widen(y) + (1 - 1 / state.train_coeff) * (z - widen(y)), y)

    return jax.tree.map(one, state.z, params, is_leaf=lambda z: isinstance(z, optax.MaskedNode))


def _check_options(options: dict[str, Any]) -> None:
    check_choice("kind", options["kind"], ("primal", "schedule_free"))
    for name, kind in (("lr_power", "schedule_free"), ("eval_coeff", "primal")):
        if options["kind"] != kind and options[name] is not None:
            raise ValueError(f"{name}={options[name]} is an option of kind={kind!r}: leave it out.")
    if options["decay"] is not None:
        check_transform("decay", options["decay"])
    check_options(options)
