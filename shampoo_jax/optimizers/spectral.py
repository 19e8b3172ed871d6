"""Updates of a fixed spectral norm, by power iterations that go on from step to step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shampoo_jax.base.options import WholeNumber, check_options
from shampoo_jax.base.paths import KeyPath, as_written
from shampoo_jax.base.signatures import suggests
from shampoo_jax.blocks.dimension_numbers import DimensionOption, resolve_dimension_numbers
from shampoo_jax.optimizers.kernels import Kernel, read_kernel
from shampoo_jax.optimizers.routing import Rule, is_embedding
from shampoo_jax.stacks.guard import Guarded, guard

Array = jax.Array


class NormalizeSpectrumState(NamedTuple):
    """State of `normalize_spectrum`."""

    count: Array  # int32[], steps taken
    vectors: Any  # a tree like the parameters of float32 [batch, outputs]; None for embeddings


@suggests
def normalize_spectrum(
    *,
    steps: int = 1,
    warmup: int = 50,
    warmup_steps: int = 5,
    embeddings: Rule | None = None,
    dimension_numbers: DimensionOption = "flax",
    seed: int = 0,
) -> Guarded:
    """Gives the update of every kernel the spectral norm `sqrt(outputs / inputs)`.

    `U <- U sqrt(outputs / inputs) / sigma`, with `sigma` the largest singular value of U as power
    iterations on `U^T U` see it, which start from the vector of the step before. Embeddings are
    divided by the root mean square of their entries, which is the same for a vector. Behind any
    direction this takes the place of its learning rates by width, see `transfer_rules`. The scale
    of updates does not matter; zero stays zero.

    Sigma is taken before the last iteration has moved the vector. An update that maps its vector to
    zero counts by the root mean square of its singular values, and gives a new vector.

    Source: arXiv:2512.05620, section on spectral normalization, with its numbers of iterations.

    Args:
      steps: Power iterations a step, each two products of a matrix and a vector.
      warmup: First steps, which have more of them.
      warmup_steps: Their iterations.
      embeddings: Callable of (path, leaf): whether a parameter is a table that is looked up. None
        means one with a component that contains `embed`, is `wte` or `wpe`, or has the word `emb`.
      dimension_numbers: Which axes are inputs and outputs, as in `Blocking`; without, the last axis
        holds outputs, all others inputs.
      seed: Of the first vectors.

    Returns:
      A transformation to be placed behind a direction. Its state is a vector of outputs for each
      matrix; a step that is not finite leaves it as it was, see `guard`.

    Raises:
      ValueError: Numbers of steps that make no sense.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> tx = optax.chain(optax.scale_by_adam(), shampoo_jax.normalize_spectrum())
      >>> params = {"embed": jnp.ones((9, 4)), "w": jnp.ones((4, 16))}
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> updates["w"][0, :2].round(3).tolist()  # of norm 2: all entries 2 / 8
      [0.25, 0.25]
      >>> updates["embed"][0, :2].round(3).tolist()
      [1.0, 1.0]
    """
    check_options({"steps": steps})
    WholeNumber("5, say")("warmup_steps", warmup_steps)
    WholeNumber("0 is none", least=0)("warmup", warmup)
    WholeNumber("any number", least=0)("seed", seed)
    rule = resolve_dimension_numbers(dimension_numbers)
    is_table = is_embedding if embeddings is None else embeddings

    def init(params: Any) -> NormalizeSpectrumState:
        def first(path: KeyPath, p: Array) -> Array | None:
            kernel = read_kernel(path, p, rule)
            if is_table(as_written(path), p) or kernel.inputs == 1:
                return None
            # It lies on a mesh as the outputs do.
            like = jnp.zeros_like(_matrices(p, kernel)).sum(1)
            v = jax.random.normal(jax.random.key(seed), like.shape, like.dtype)
            return like + v / jnp.linalg.norm(v, axis=-1, keepdims=True)

        vectors = jax.tree_util.tree_map_with_path(first, params)
        return NormalizeSpectrumState(jnp.zeros([], jnp.int32), vectors)

    def update(updates: Any, state: NormalizeSpectrumState, params: Any = None) -> tuple[Any, Any]:
        del params
        count = optax.safe_increment(state.count)
        iterations = jnp.where(count <= warmup, warmup_steps, steps)
        leaves, structure = jax.tree_util.tree_flatten_with_path(updates)
        new, moved = [], []
        for (path, u), v in zip(leaves, structure.flatten_up_to(state.vectors), strict=True):
            kernel = read_kernel(path, u, rule)
            one = functools.partial(_normalized, kernel=kernel, iterations=iterations)
            scaled, vector = (_by_mean_square(u), None) if v is None else one(u, v)
            new.append(scaled)
            moved.append(vector)
        vectors = structure.unflatten(moved)
        return structure.unflatten(new), NormalizeSpectrumState(count, vectors)

    return guard(optax.GradientTransformation(init, update))


def _matrices(x: Array, kernel: Kernel) -> Array:
    """`[batch, inputs, outputs]`."""
    return x.transpose(kernel.axes).reshape(kernel.batch, kernel.inputs, kernel.outputs)


def _normalized(u: Array, v: Array, *, kernel: Kernel, iterations: Array) -> tuple[Array, Array]:
    """An update of the wanted norm, and the vector for the next one."""
    a = _unit(_matrices(u, kernel), (1, 2))
    fixed = jax.lax.stop_gradient(a)
    v = jax.lax.fori_loop(1, iterations, lambda _, v: _iterate(fixed, v), v)
    sigma, frobenius = _norm(_times(a, v), (1,)), _norm(a, (1, 2))[..., 0]
    mean = frobenius / min(kernel.inputs, kernel.outputs) ** 0.5
    sigma = jnp.where(sigma > 0, sigma, mean)[..., None]
    wanted = (kernel.outputs / kernel.inputs) ** 0.5
    out = jnp.where(sigma > 0, a * (wanted / jnp.where(sigma > 0, sigma, 1.0)), 0.0)
    shape = [u.shape[axis] for axis in kernel.axes]
    return out.reshape(shape).transpose(np.argsort(kernel.axes)), _iterate(fixed, v)


def _iterate(a: Array, v: Array) -> Array:
    """The next vector; where the matrix maps it to zero one that it does not, if there is any."""
    y = _times(a, v)
    z = jnp.sum(a * y[:, :, None], axis=1)
    length, columns = _norm(z, (1,)), jnp.sqrt(jnp.sum(a * a, axis=1))
    z = jnp.where(length > 0, z, columns)
    length = _norm(z, (1,))
    return jnp.where(length > 0, z / jnp.where(length > 0, length, 1.0), v)


def _times(a: Array, v: Array) -> Array:
    """`A v`, as a sum: on Explicit axes a product would have to be told how its result lies."""
    return jnp.sum(a * v[:, None, :], axis=2)


def _norm(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.sum(x * x, axis=axes, keepdims=True))


def _unit(x: Array, axes: Any) -> Array:
    """X divided by its largest entry."""
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)
    return x / jnp.where(largest > 0, largest, 1.0)


def _by_mean_square(u: Array) -> Array:
    a = _unit(u, None)
    size = jnp.sqrt(jnp.mean(a * a))
    return jnp.where(size > 0, a / jnp.where(size > 0, size, 1.0), 0.0)
