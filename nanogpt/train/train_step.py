"""One optimizer step and one evaluation, each a single jitted function."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from nanogpt.config.run import Config, ModelConfig
from nanogpt.model.build import make_model
from nanogpt.model.loss import pairwise_sum, token_losses
from nanogpt.optimizers.schedules import window_schedule
from nanogpt.train.mesh import Layout

Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array  # int32 scalar: updates done so far
    params: optax.Params  # nested dict of arrays, paths as in `GPT`
    opt_state: optax.OptState


def abstract_params(config: ModelConfig) -> optax.Params:
    """Shapes and dtypes of the parameter tree; computes nothing.

    Args:
        config: The model.

    Returns:
        Nested dict of `jax.ShapeDtypeStruct`.
    """
    return jax.eval_shape(lambda: draw_params(config, 0))


def model_structure(config: ModelConfig) -> nnx.GraphDef:
    """The model without its parameters; computes nothing.

    Args:
        config: The model.

    Returns:
        What `nnx.merge` needs beside a parameter tree to give the model.
    """
    return nnx.graphdef(nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0))))


def draw_params(config: ModelConfig, seed: Any) -> optax.Params:
    """Initial weights of a seed, or of its key, which may be traced."""
    return nnx.to_pure_dict(nnx.state(make_model(config, nnx.Rngs(seed)), nnx.Param))


def init_state(
    config: Config, tx: optax.GradientTransformation, layout: Layout | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """Draws the weights from `config.seed` and initializes the optimizer, in one jitted call.

    Args:
        config: The run.
        tx: The optimizer, see `nanogpt.optimizers.build.build_optimizer`.
        layout: Where parameters lie on a mesh; the optimizer knows where its own state does.

    Returns:
        The model's static part, and the state before the first step.
    """

    @jax.jit
    def init() -> TrainState:
        params = draw_params(config.model, config.seed)
        params = params if layout is None else layout.pin(params)
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

    return model_structure(config.model), init()


def summed_loss(
    graphdef: nnx.GraphDef, params: optax.Params, batch: Batch, layout: Layout | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum of the cross entropy over all tokens of a batch, twice.

    Args:
        graphdef: The model's static part.
        params: Its parameters.
        batch: {"inputs", "targets"}, int32 (rows, T), and what `at_step` adds.
        layout: Where the batch lies on a mesh.

    Returns:
        The sum to differentiate, and the same sum, pairwise, to report.
    """
    windows = [batch["window"][0, 0]] if "window" in batch else []
    raw_BxTxV = nnx.merge(graphdef, params).raw_logits(batch["inputs"], *windows)
    raw_NxV = raw_BxTxV.reshape(-1, raw_BxTxV.shape[-1])
    losses_N = token_losses(raw_NxV, batch["targets"].ravel())
    # Halving what lies on many devices would send a little at every halving.
    whole_N = losses_N if layout is None else layout.gathered(losses_N)
    return losses_N.sum(), pairwise_sum(whole_N)


def at_step(batch: Batch, config: Config, step: jax.typing.ArrayLike) -> Batch:
    """Adds what the model has to know of the step: "window", int32 (rows, 1), the same everywhere.

    Args:
        batch: {"inputs", "targets"}.
        config: The run; without a window of `model.kind` "medium" the batch stays as it is.
        step: Updates done so far.
    """
    if config.model.kind != "medium":
        return batch
    window = window_schedule(config)(step)
    return batch | {"window": jnp.broadcast_to(window, (len(batch["inputs"]), 1))}


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    config: Config,
    layout: Layout | None = None,
    shardings: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the jitted step; it consumes (donates) the state it is given.

    A guarded optimizer leaves everything as it was where a gradient is not finite, and counts that.

    Gradients are those of the loss summed over every token of the batch, divided by their number if
    `config.loss` says so. They are taken with respect to float32 copies of the parameters,
    accumulated over microbatches in float32, and rounded to the parameters' precision once.

    Args:
        graphdef: The model's static part, from `init_state`.
        tx: The optimizer.
        config: The run; `data.microbatch_rows` rows go through the model at a time.
        layout: Where parameters and batches lie on a mesh.
        shardings: Where all of the state does, before and after a step; None with one device.

    Returns:
        Function (state, {"inputs", "targets"} int32 (batch_rows, T)) -> (state, metrics); metrics
        are scalars: "loss", nats per token before the update, "grad_norm", the norm of the gradient
        of that mean, of a guarded optimizer "skipped" and "skipped_in_a_row", and of one that
        counts them "refreshed", bases so far.
    """
    gradients = make_gradients(graphdef, config, layout)
    update = optax.with_extra_args_support(tx).update

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = at_step(batch, config, state.step)
        total, grads, kept = gradients(state.params, batch)
        further = {} if kept is None else {"further": {"microbatches": kept}}
        tokens, norm = batch["targets"].size, optax.tree.norm(grads) * _parts(batch, config)
        objective = _objective(batch, config, layout)
        updates, opt_state = update(
            grads, state.opt_state, state.params, obj_fn=objective, **further
        )
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": total / tokens, "grad_norm": norm / tokens}
        if isinstance(opt_state, optax.ApplyIfFiniteState):
            metrics["skipped"] = opt_state.total_notfinite
            metrics["skipped_in_a_row"] = opt_state.notfinite_count
        refreshed = optax.tree.get(opt_state, "refreshed")
        metrics |= {} if refreshed is None else {"refreshed": refreshed}
        return TrainState(state.step + 1, params, opt_state), metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_gradients(
    graphdef: nnx.GraphDef, config: Config, layout: Layout | None = None
) -> Callable[[optax.Params, Batch], tuple[jax.Array, optax.Updates, Any]]:
    """Builds the forward and backward pass of a step, to be called in a jitted function.

    Args:
        graphdef: The model's static part, from `init_state`.
        config: The run; `data.microbatch_rows` rows go through the model at a time.
        layout: Where parameters and batches lie on a mesh.

    Returns:
        Function (params, batch with what `at_step` adds) -> (summed loss, gradients of it or of the
        mean, as `config.loss` says, those of each microbatch or None).
    """
    sums, keep = functools.partial(_sums, graphdef), config.matrices.reads_microbatches

    def gradients(params: optax.Params, batch: Batch) -> tuple[jax.Array, optax.Updates, Any]:
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        rows, kept = config.data.microbatch_rows, None
        if layout is not None and layout.scatter_gradients:
            piece = rows // layout.mesh.size
            total, grads = layout.summed(lambda p, b: sums(p, b, piece, None)[0], wide, batch)
        else:
            (total, grads), kept = sums(wide, batch, rows, layout, keep)
            grads = grads if layout is None else layout.pin(grads)
        grads, kept = jax.tree.map(lambda g: g / _parts(batch, config), (grads, kept))
        return total, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), kept

    return gradients


def _sums(
    graphdef: nnx.GraphDef, wide: optax.Params, batch: Batch, rows: int, layout: Layout | None,
    keep: bool = False,
) -> tuple[tuple[jax.Array, optax.Updates], Any]:  # fmt: skip
    """Loss and gradients summed over a batch, `rows` rows at a time, and those of each if asked.

    These are multiplied by their number, so that their mean is the batch's.
    """

    def accumulate(carry, piece):
        def loss(p: optax.Params):
            return summed_loss(graphdef, p, piece, layout)

        (_, total), grads = jax.value_and_grad(loss, has_aux=True)(wide)
        times = jax.tree.map(lambda g: g * count, grads) if keep else None
        return jax.tree.map(jnp.add, carry, (total, grads)), times

    count = len(batch["inputs"]) // rows
    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, wide))
    return jax.lax.scan(accumulate, start, _microbatches(batch, rows, layout))


def _objective(
    batch: Batch, config: Config, layout: Layout | None
) -> Callable[[optax.Params], jax.Array]:
    """The loss as a function of the parameters, for optimizers that evaluate it again.

    Differentiating it holds the activations of one microbatch at a time. It may be differentiated
    twice, as Sophia does, so attention is XLA's: cuDNN's has a first derivative only.
    """

    def objective(params: optax.Params) -> jax.Array:
        graphdef = model_structure(dataclasses.replace(config.model, attention="xla"))

        @jax.checkpoint
        def loss(piece: Batch) -> jax.Array:
            return summed_loss(graphdef, params, piece)[0]

        total = jax.lax.map(loss, _microbatches(batch, config.data.microbatch_rows, layout)).sum()
        return total / _parts(batch, config)

    return objective


def _parts(batch: Batch, config: Config) -> int:
    """What the loss that optimizers see is divided by."""
    return batch["targets"].size if config.loss == "mean" else 1


def _microbatches(batch: Batch, rows: int, layout: Layout | None) -> Batch:
    """(rows, T) -> (microbatches, rows, T), every microbatch spread over all devices."""
    pieces = jax.tree.map(lambda x: x.reshape(-1, rows, x.shape[-1]), batch)
    return (
        pieces if layout is None else jax.lax.with_sharding_constraint(pieces, layout.microbatches)
    )


def make_eval_step(
    graphdef: nnx.GraphDef, config: Config, layout: Layout | None = None
) -> Callable[..., jax.Array]:
    """Builds the jitted evaluation.

    Args:
        graphdef: The model's static part, from `init_state`.
        config: The run; `data.microbatch_rows` rows go through the model at a time.
        layout: Where parameters and batches lie on a mesh.

    Returns:
        Function (params, {"inputs", "targets"} int32 (rows, T), step) -> sum of the cross entropy
        over all rows and tokens, float32 nats. `rows` must be a multiple of `microbatch_rows`; the
        step, 0 if left out, decides the window of attention.
    """

    def evaluate(params: optax.Params, batch: Batch, step: jax.typing.ArrayLike = 0) -> jax.Array:
        batch = at_step(batch, config, step)
        pieces = _microbatches(batch, config.data.microbatch_rows, layout)
        sums = jax.lax.map(lambda piece: summed_loss(graphdef, params, piece, layout)[1], pieces)
        return pairwise_sum(sums)

    return jax.jit(evaluate)
