"""One step of training a residual network, and its evaluation, on any number of devices.

Images are spread over the devices; parameters, batch statistics and, without a `Placement`, the
optimizer's state are whole on each. Batch statistics are those of the whole batch, of all devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from docs.gallery.images.resnet import ResNetConfig, apply, draw, structure
from shampoo_jax import state_shardings

AXIS = "data"
Batch = dict[str, jax.Array]  # "images" float32 (B, H, W, C), "labels" int32 (B,), "weights" (B,)
Prepare = Callable[[jax.Array], jax.Array]


class State(NamedTuple):
    """What training carries from step to step.

    Attributes:
        step: int32, updates done.
        params: of the network.
        stats: its batch statistics.
        opt_state: of the optimizer.
    """

    step: jax.Array
    params: Any
    stats: Any
    opt_state: Any


def losses(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Cross entropy of each image, nats: of `(1 - s)` on its label and `s / K` on every class.

    Args:
        logits: (B, K).
        labels: (B,).
        smoothing: s, in [0, 1) (Szegedy et al. 2016, arXiv:1512.00567, section 7).
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def initial(config: ResNetConfig, tx: optax.GradientTransformation, seed: int) -> State:
    """The state before the first step.

    Args:
        config: of the network.
        tx: the optimizer.
        seed: of the weights.
    """
    params, stats = draw(config, seed)
    return State(jnp.zeros((), jnp.int32), params, stats, tx.init(params))


def abstract(
    config: ResNetConfig, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[State, State]:
    """Shapes of the state, where they lie, and these shardings alone; computes nothing.

    Args:
        config: of the network.
        tx: the optimizer, with its `Placement` if it has one.
        mesh: of devices that need not be there.
    """
    whole = NamedSharding(mesh, P())

    def struct(x: Any, sharding: Any = whole) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params, stats = jax.tree.map(struct, jax.eval_shape(lambda: draw(config, 0)))
    placed = state_shardings(tx, params, mesh)
    opt_state = jax.tree.map(struct, jax.eval_shape(tx.init, params), placed)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    state = State(step, params, stats, opt_state)
    return state, jax.tree.map(lambda x: x.sharding, state)


def make_step(
    config: ResNetConfig,
    tx: optax.GradientTransformation,
    *,
    smoothing: float = 0.0,
    dtype: Any = jnp.float32,
    prepare: Prepare = jnp.asarray,
    shardings: State | None = None,
) -> Callable[..., tuple[State, jax.Array]]:
    """Builds the jitted step; it consumes the state it is given.

    Args:
        config: of the network.
        tx: the optimizer.
        smoothing: of labels.
        dtype: of activations.
        prepare: makes of a batch's images what the network takes.
        shardings: of the state, see `abstract`; None on one device.

    Returns:
        Function (state, batch, **extra) -> (state, mean loss before the update); what is extra goes
        to the optimizer.
    """
    graphdef, _ = structure(config, dtype)
    update = optax.with_extra_args_support(tx).update

    def step(state: State, batch: Batch, **extra: Any) -> tuple[State, jax.Array]:
        def mean(params: Any) -> tuple[jax.Array, Any]:
            logits, stats = apply(graphdef, params, state.stats, prepare(batch["images"]))
            return losses(logits, batch["labels"], smoothing).mean(), stats

        (loss, stats), grads = jax.value_and_grad(mean, has_aux=True)(state.params)
        updates, opt_state = update(grads, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, params, stats, opt_state), loss

    placed: dict[str, Any] = {} if shardings is None else {"out_shardings": (shardings, None)}
    return jax.jit(step, donate_argnums=0, **placed)


def make_evaluation(
    config: ResNetConfig, *, dtype: Any = jnp.float32, prepare: Prepare = jnp.asarray
) -> Callable[..., jax.Array]:
    """Builds the jitted evaluation.

    Args:
        config: of the network.
        dtype: of activations.
        prepare: as of `make_step`.

    Returns:
        Function (params, stats, batch) -> float32 (3,): sums of loss, of correct answers and of
        weights over the images of weight 1.
    """
    _, graphdef = structure(config, dtype)

    def evaluate(params: Any, stats: Any, batch: Batch) -> jax.Array:
        logits, _ = apply(graphdef, params, stats, prepare(batch["images"]))
        right = logits.argmax(-1) == batch["labels"]
        each = jnp.stack([losses(logits, batch["labels"]), right, jnp.ones_like(right)])
        return jnp.sum(each * batch["weights"], axis=1)

    return jax.jit(evaluate)


def kernels(params: Any) -> Any:
    """Which parameters decay: kernels, not gains and biases; a tree of booleans."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)
