"""Gradients with the spectra that Shampoo meets: few strong directions, many weak ones, noise."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

DECAY = 0.75  # of the strong directions' strength, i^-DECAY
NOISE = 2e-5  # the noise's share of a factor's largest eigenvalue; the cutoff at 768 is 9e-5


def coloured_gradients(params: Any, seed: int = 0) -> Callable[[Any], Any]:
    """A different gradient for every step, with factors that no solver finds easy.

    A gradient is `A N B^T` plus noise: A and B fixed Gaussian frames of a third of the matrix's
    smaller side, N Gaussian with variance `(i j)^-1.5`, new at every step. So a third of a factor's
    eigenvalues fall like `i^-1.5` down to the cutoff and the rest is a noise floor below it. Zeros
    and identities would let Newton iterations stop at once and LAPACK deflate.

    Args:
        params: Tree of matrices or shape structs.
        seed: Of everything.

    Returns:
        Compiled function of the step, giving a tree like `params`, ready when it returns.
    """
    leaves, structure = jax.tree.flatten(params)
    shapes = sorted({leaf.shape for leaf in leaves})
    key = jax.random.key(seed, impl="rbg")  # whose programs compile fast

    def stack(kind: jax.Array, shape: tuple[int, int], count: int, step: jax.Array) -> jax.Array:
        rank = max(1, min(shape) // 3)
        strength = jnp.arange(1, rank + 1) ** -DECAY
        left, right, core, noise = jax.random.split(kind, 4)
        frames = [
            jax.random.normal(k, (count, d, rank)) / d**0.5
            for k, d in zip((left, right), shape, strict=True)
        ]
        fresh = jax.random.normal(jax.random.fold_in(core, step), (count, rank, rank))
        signal = jnp.einsum(
            "nir,nrs,njs->nij", frames[0], fresh * jnp.outer(strength, strength), frames[1]
        )
        total = jnp.sum(strength**2) * NOISE / max(shape)
        return signal + total**0.5 * jax.random.normal(
            jax.random.fold_in(noise, step), (count, *shape)
        )

    @jax.jit
    def make(step: jax.Array) -> Any:
        made = {
            shape: iter(
                stack(
                    jax.random.fold_in(key, i),
                    shape,
                    sum(leaf.shape == shape for leaf in leaves),
                    step,
                )
            )
            for i, shape in enumerate(shapes)
        }
        return structure.unflatten([next(made[x.shape]).astype(x.dtype) for x in leaves])

    return lambda step: jax.block_until_ready(make(jnp.asarray(step)))


def coloured_factors(count: int, size: int, seed: int = 0, steps: int = 3) -> jax.Array:
    """Averages of `G G^T` over a few coloured gradients of square matrices, `[count, size, size]`.

    Args:
        count: Number of factors.
        size: Their edge.
        seed: Of everything.
        steps: Gradients that enter, with weights `0.9^age`.
    """
    make = coloured_gradients([jax.ShapeDtypeStruct((size, size), jnp.float32)] * count, seed)

    @jax.jit
    def add(total: jax.Array, gradients: list[jax.Array]) -> jax.Array:
        g = jnp.stack(gradients)
        return 0.9 * total + jnp.matmul(g, g.swapaxes(1, 2), precision=jax.lax.Precision.HIGHEST)

    total = jnp.zeros((count, size, size))
    for step in range(steps):
        total = add(total, make(step))
    return jax.block_until_ready(total)
