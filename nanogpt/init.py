"""Initial weights of the benchmark's model."""

import jax
import jax.numpy as jnp

from nanogpt.config import Dtype


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
