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


def linear(
    init: Init, role: Role, fan_in: int, fan_out: int, next_key: Callable[[], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Draws kernel and bias of one Linear.

    "benchmark": `linear_normal`; projections back into the stream, the head and all biases are 0.
    "record2": torch's defaults, U(-1, 1) / sqrt(fan_in) for kernel and bias; projections and the
    head are 0 with their biases. "record27": the same, but projections are drawn and kernels times
    `GROWN`. "record33": kernels N(0, 1 / (3 fan_in)) times `GROWN`; torch's defaults for the head
    and all biases.

    Args:
        init: Which result's start.
        role: Which Linear of the model.
        fan_in: Rows of the kernel.
        fan_out: Columns of the kernel.
        next_key: Gives a fresh random key at each call.

    Returns:
        float32 arrays (fan_in, fan_out) and (fan_out,).

    Source: modded-nanogpt track 3, `train_gpt_simple.py` and results 2, 27, 33.

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
    if init == "benchmark":
        return (linear_normal(next_key(), fan_in, fan_out) if inner else zero_kernel), zero_bias
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
