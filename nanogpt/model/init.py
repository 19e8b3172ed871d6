"""Initial weights: those of the benchmark's model, and those that single results start from."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from nanogpt.config.run import Init
from nanogpt.config.settings import Dtype

Role = Literal["qkv", "attn_proj", "fc", "mlp_proj", "head"]

# Results 27 and 33: a matrix whose norm is held has to start at a norm to stay at.
GROWN = {"qkv": 1.0, "attn_proj": 1.25, "fc": 1.5, "mlp_proj": 3.0, "head": 1.0}
# Result 44: gains 1 -+ this, and the share that the last layer's fc is smaller by.
GAIN, FC_FALL = 0.125, 0.30


def linear(
    init: Init, role: Role, fan_in: int, fan_out: int, next_key: Callable[[], jax.Array]
) -> tuple[jax.Array, jax.Array | None]:
    """Draws kernel and bias of one Linear.

    "benchmark": `linear_normal`; projections back into the stream, the head and all biases are 0.
    "record2": torch's defaults, U(-1, 1) / sqrt(fan_in) for kernel and bias; projections and the
    head are 0 with their biases. "record27": the same, but projections are drawn and kernels times
    `GROWN`. "record33": kernels N(0, 1 / (3 fan_in)) times `GROWN`; torch's defaults for the head
    and all biases.

    "medium": kernels uniform with standard deviation 0.5 / sqrt(fan_in); projections and the head
    are 0; there are no biases.

    "record37": `linear_normal` times `GROWN`, the head included; all biases are 0. "record44": as
    "record2"; `depth_factor` and `gain_signs` are the rest of it.

    Args:
        init: Which result's start.
        role: Which Linear of the model.
        fan_in: Rows of the kernel.
        fan_out: Columns of the kernel.
        next_key: Gives a fresh random key at each call.

    Returns:
        float32 arrays (fan_in, fan_out) and (fan_out,), or None.

    Source: modded-nanogpt track 3, `train_gpt_simple.py` and results 2, 27, 33, 37, 44; its medium
    track's record of 2025-04-22.

    Example:
        >>> kernel, bias = linear("record27", "head", 8, 4, lambda: jax.random.key(0))
        >>> float(abs(kernel).sum() + abs(bias).sum())
        0.0
    """

    def uniform(*shape: int) -> jax.Array:
        return jax.random.uniform(next_key(), shape, jnp.float32, -1, 1) * fan_in**-0.5

    zero_kernel = jnp.zeros((fan_in, fan_out), jnp.float32)
    zero_bias = jnp.zeros((fan_out,), jnp.float32)
    inner = role in ("qkv", "fc")
    if init == "medium":
        return (uniform(fan_in, fan_out) * 0.75**0.5 if inner else zero_kernel), None
    if init == "benchmark":
        return (linear_normal(next_key(), fan_in, fan_out) if inner else zero_kernel), zero_bias
    if init == "record37":
        return linear_normal(next_key(), fan_in, fan_out) * GROWN[role], zero_bias
    if init == "record33":
        if role == "head":
            return uniform(fan_in, fan_out), uniform(fan_out)
        normal = jax.random.normal(next_key(), (fan_in, fan_out), jnp.float32)
        return normal * (3 * fan_in) ** -0.5 * GROWN[role], uniform(fan_out)
    drawn = inner or (init == "record27" and role != "head")
    kernel = uniform(fan_in, fan_out) if drawn else zero_kernel
    if init == "record27":
        kernel = kernel * GROWN[role]
    return kernel, uniform(fan_out) if inner else zero_bias


def linear_normal(key: jax.Array, fan_in: int, fan_out: int) -> jax.Array:
    """Draws a kernel of every Linear that is not zeroed: N(0, 0.33 / fan_in).

    A plain normal, neither truncated nor uniform, and 0.33 rather than 1/3.

    Args:
        key: Random key.
        fan_in: Rows of the kernel.
        fan_out: Columns of the kernel.

    Returns:
        float32 array (fan_in, fan_out).

    Source: KellerJordan/modded-nanogpt, records/track_3_optimization, `train_gpt_simple.py`.

    Example:
        >>> kernel = linear_normal(jax.random.key(0), 768, 3072)
        >>> kernel.shape, round(float(kernel.std()), 4)
        ((768, 3072), 0.0207)
    """
    return jax.random.normal(key, (fan_in, fan_out), jnp.float32) * (0.33 / fan_in) ** 0.5


def depth_factor(layer: int, layers: int) -> float:
    """Factor of the fc kernel of a layer of result 44: 1 at the first, 0.7 at the last.

    >>> round(depth_factor(11, 12), 6)
    0.7
    """
    return 1 - FC_FALL * layer / max(1, layers - 1)


def gain_signs(
    layers: int, width: int, head_dim: int, next_key: Callable[[], jax.Array]
) -> list[jax.Array]:
    """Draws the signs of the gains of result 44: they start at 1 - 0.125 s, then 1 + 0.125 s.

    Layers of the first half have independent signs. The others come in pairs, head by head: of
    `head_dim` signs the number of +1 is taken, its distance from one half is halved, and so many
    +1 are placed anew; the partner has as many -1, at places of its own.

    Args:
        layers: Of the model.
        width: Of the residual stream.
        head_dim: Of a head, which divides it.
        next_key: Gives a fresh random key at each call.

    Returns:
        float32 arrays (width,) of +1 and -1, one a layer.

    Example:
        >>> keys = iter(jax.random.split(jax.random.key(0), 99))
        >>> signs = gain_signs(4, 8, 4, lambda: next(keys))
        >>> [int((signs[2] + signs[3])[i : i + 4].sum()) for i in (0, 4)]
        [0, 0]
    """

    def placed(count: jax.Array) -> jax.Array:
        order = jax.random.permutation(next_key(), head_dim)
        return jnp.where(order < count, 1.0, -1.0)

    first = layers // 2 + (layers - layers // 2) % 2
    signs = [jax.random.rademacher(next_key(), (width,), jnp.float32) for _ in range(first)]
    for _ in range(first, layers, 2):
        pairs = []
        for _ in range(width // head_dim):
            drawn = jax.random.bernoulli(next_key(), 0.5, (head_dim,)).sum()
            count = jnp.round(head_dim / 2 + (drawn - head_dim / 2) / 2)
            pairs.append((placed(count), placed(head_dim - count)))
        signs += [jnp.concatenate(half) for half in zip(*pairs, strict=True)]
    return signs


def embedding_normal(key: jax.Array, vocab_size: int, model_dim: int, dtype: Dtype) -> jax.Array:
    """Draws the embedding: N(0, 1) in float32, rounded to `dtype`.

    Args:
        key: Random key.
        vocab_size: Rows.
        model_dim: Columns.
        dtype: Stored precision.

    Returns:
        Array (vocab_size, model_dim) of `dtype`.

    Example:
        >>> embedding_normal(jax.random.key(0), 8, 4, "bfloat16").dtype.name
        'bfloat16'
    """
    return jax.random.normal(key, (vocab_size, model_dim), jnp.float32).astype(dtype)
