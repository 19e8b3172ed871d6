"""The benchmark's GPT in Flax NNX.

Shapes are part of the names: B rows, T positions, D residual width, N heads, H head width,
V vocabulary. Kernels are stored (in, out), the transpose of the torch script's.

Source of every constant: KellerJordan/modded-nanogpt, records/track_3_optimization,
`train_gpt_simple.py`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanogpt.config.run import ModelConfig
from nanogpt.model import init

RMS_EPS = 2.0**-23  # machine epsilon of float32, also for bfloat16 activations
ATTENTION_SCALE = 0.12  # instead of 1 / sqrt(head_dim)
LOGIT_CAP = 15.0


def rms_norm(x: jax.Array, gain: jax.Array | None = None) -> jax.Array:
    """Scales the last axis to root mean square 1: x * rsqrt(mean(x^2) + 2^-23) * gain.

    Computed in float32 and rounded once; the gain is rounded to the precision of x first.

    Args:
        x: Array (..., D), float32 or bfloat16.
        gain: float32 array (D,), or None.

    Returns:
        Array of the shape and dtype of x.

    Example:
        >>> rms_norm(jnp.array([3.0, 4.0])).tolist()
        [0.8485, 1.1314]
    """
    wide = x.astype(jnp.float32)
    out = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + RMS_EPS)
    if gain is not None:
        out = out * _round_to(gain, x.dtype)
    return out.astype(x.dtype)


def _round_to(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rounds float32 values to those of `dtype`; XLA may not elide it, as it may a cast."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def widen_exactly(x: jax.Array) -> jax.Array:
    """Casts to float32, keeping the rounding of x that XLA may otherwise fuse away.

    Args:
        x: Float array.

    Returns:
        float32 array whose values are those of x.

    Example:
        >>> widen_exactly(jnp.ones(2, jnp.bfloat16)).dtype.name
        'float32'
    """
    return _round_to(x.astype(jnp.float32), x.dtype)


@functools.lru_cache
def _rotary_tables(length: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine (length, head_dim / 2), float32; the second half of the pairs stands still.

    The moving frequencies run geometrically from 1 to 1/1024, both included.
    """
    angles = np.arange(length, dtype=np.float32)[:, None] * rotary_frequencies(head_dim)
    return np.cos(angles), np.sin(angles)


def rotary_frequencies(head_dim: int) -> np.ndarray:
    """Radians that each pair of a head turns by at a position, float32 (head_dim / 2,).

    >>> rotary_frequencies(8).tolist()
    [1.0, 0.0009765625, 0.0, 0.0]
    """
    moving = (1 / 1024) ** np.linspace(0, 1, head_dim // 4, dtype=np.float32)
    return np.concatenate([moving, np.zeros(head_dim // 4, np.float32)])


def rotate(x_BxTxNxH: jax.Array, start: jax.Array | int = 0, length: int = 0) -> jax.Array:
    """Rotary embedding: pair (i, i + H/2) of position t turns by -t * f_i.

    y1 = x1 cos + x2 sin, y2 = x2 cos - x1 sin, computed in float32; f_i = (1/1024)^(i / (H/4 - 1))
    for i < H/4, else 0. (The usual convention turns the other way, which for given weights is a
    different model.)

    Args:
        x_BxTxNxH: Queries or keys.
        start: Position of the first of them, which may be traced.
        length: Positions that there are, of which these are a part; 0: as many as are given.

    Returns:
        Array of the shape and dtype of the argument.

    Example:
        >>> x = jnp.ones((1, 2, 1, 4))
        >>> rotate(x)[0, 1, 0].tolist()  # position 1, frequency 1 and 0
        [1.3818, 1.0, -0.3012, 1.0]
    """
    here, head_dim = x_BxTxNxH.shape[1], x_BxTxNxH.shape[3]
    tables = _rotary_tables(length or here, head_dim)
    if length:
        tables = [jax.lax.dynamic_slice_in_dim(jnp.asarray(t), start, here) for t in tables]
    return turn(x_BxTxNxH, tables)


def turn(x_BxTxNxH: jax.Array, tables: Sequence[jax.Array | np.ndarray]) -> jax.Array:
    """`rotate` by tables (T, H/2) of cosines and sines, computed in float32.

    Example:
        >>> turn(jnp.ones((1, 1, 1, 4)), 2 * (jnp.ones((1, 2)),))[0, 0, 0].tolist()
        [2.0, 2.0, 0.0, 0.0]
    """
    cos, sin = (table[:, None, :] for table in tables)
    x1, x2 = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1)
    return turned.astype(x_BxTxNxH.dtype)


def soft_cap(logits: jax.Array) -> jax.Array:
    """Bounds logits by 15 z / sqrt(z^2 + 225).

    Args:
        logits: float32 array.

    Returns:
        float32 array, every entry within (-15, 15).

    Example:
        >>> float(soft_cap(jnp.float32(20.0)))
        12.0
    """
    return LOGIT_CAP * logits * jax.lax.rsqrt(logits * logits + LOGIT_CAP**2)


def cut_to(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Casts float32 toward zero; the derivative is that of a cast.

    Example:
        >>> float(cut_to(jnp.float32(1.999), jnp.bfloat16)), float(jnp.bfloat16(1.999))
        (1.9921875, 2.0)
    """
    spare = jnp.finfo(x.dtype).nmant - jnp.finfo(dtype).nmant
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), jnp.uint32)
    cut = jax.lax.bitcast_convert_type(bits >> spare << spare, x.dtype)
    # Both differences are exact, and the sum is what was cut.
    return (x + (cut - jax.lax.stop_gradient(x))).astype(dtype)


class Linear(nnx.Module):
    """x @ kernel + bias in the precision of x; parameters are float32.

    Attributes:
        toward_zero: Whether the kernel is cut to that precision, instead of rounded to nearest.
    """

    toward_zero = False

    def __init__(self, kernel: jax.Array, bias: jax.Array | None):
        """Takes what `init.linear` gives: (fan_in, fan_out), and (fan_out,) or None."""
        self.kernel = nnx.Param(kernel)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., fan_in) -> (..., fan_out), dtype of x."""
        rows = x.reshape(-1, x.shape[-1])  # one plain matrix product: 1.2 times as fast on CPU
        kernel = self.kernel[...]
        kernel = cut_to(kernel, x.dtype) if self.toward_zero else kernel.astype(x.dtype)
        out = rows @ kernel
        if self.bias is not None:
            out = out + self.bias[...].astype(x.dtype)
        return out.reshape(*x.shape[:-1], -1)


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned gain, initially 1."""

    def __init__(self, model_dim: int):
        self.scale = nnx.Param(jnp.ones((model_dim,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) -> (..., D), dtype of x."""
        return rms_norm(x, self.scale[...])


class Embed(nnx.Module):
    """Table of token vectors, stored in `embed_dtype`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.embedding = nnx.Param(
            init.embedding_normal(
                rngs.params(), config.vocab_size, config.model_dim, config.embed_dtype
            )
        )

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """(B, T) int32 -> (B, T, D)."""
        return self.embedding[...][tokens_BxT]


class Attention(nnx.Module):
    """Causal self-attention with normalized queries and keys."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width = config.model_dim
        draw = functools.partial(init.linear, config.init, next_key=rngs.params)
        self.q = Linear(*draw("qkv", width, width))
        self.k = Linear(*draw("qkv", width, width))
        self.v = Linear(*draw("qkv", width, width))
        self.proj = Linear(*draw("attn_proj", width, width))
        self.head_dim = config.head_dim
        known = config.attention != "auto" or config.dtype == "bfloat16"
        self.attention = config.attention if known else "xla"

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """(B, T, D) -> (B, T, D), dtype of the argument."""
        out_BxTxNxH = attend(*self.heads(x_BxTxD), self.attention)
        return self.proj(out_BxTxNxH.reshape(x_BxTxD.shape))

    def heads(self, x_BxTxD: jax.Array, *place: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, (B, T, N, H) each; `place` as of `rotate`."""
        heads = (*x_BxTxD.shape[:2], -1, self.head_dim)
        q_BxTxNxH = rotate(rms_norm(self.q(x_BxTxD).reshape(heads)), *place)
        k_BxTxNxH = rotate(rms_norm(self.k(x_BxTxD).reshape(heads)), *place)
        return q_BxTxNxH, k_BxTxNxH, self.v(x_BxTxD).reshape(heads)


def attend(
    q_BxTxNxH: jax.Array,
    k_BxTxNxH: jax.Array,
    v_BxTxNxH: jax.Array,
    attention: str,
) -> jax.Array:
    """Causal attention by one of two kernels.

    Args:
        q_BxTxNxH: Queries (B, T, N, H).
        k_BxTxNxH: Keys, of the same shape.
        v_BxTxNxH: Values, of the same shape.
        attention: "xla", "cudnn", or "auto": cuDNN's flash attention in a program for NVIDIA GPUs,
            where cuDNN is installed and takes these shapes, XLA's in any other program.

    Returns:
        Array (B, T, N, H) of the dtype of the arguments.
    """

    def by(implementation: Any) -> Callable[..., jax.Array]:
        return functools.partial(
            jax.nn.dot_product_attention,
            scale=ATTENTION_SCALE,
            is_causal=True,
            implementation=implementation,
        )

    heads = q_BxTxNxH, k_BxTxNxH, v_BxTxNxH
    if attention != "auto":
        return by(attention)(*heads)
    try:
        return jax.lax.platform_dependent(*heads, cuda=by("cudnn"), default=by("xla"))
    except (RuntimeError, ValueError):  # jax's: no cuDNN here, or none that takes these shapes
        return by("xla")(*heads)


class MLP(nnx.Module):
    """Two Linears around relu(x)^2."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        draw = functools.partial(init.linear, config.init, next_key=rngs.params)
        self.fc = Linear(*draw("fc", config.model_dim, config.mlp_dim))
        self.proj = Linear(*draw("mlp_proj", config.mlp_dim, config.model_dim))

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """(B, T, D) -> (B, T, D), dtype of the argument."""
        return self.proj(jnp.square(jax.nn.relu(self.fc(x_BxTxD))))


class Block(nnx.Module):
    """Attention and MLP, each behind its own norm, added to the residual stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, residual: float = 1.0):
        self.norm1 = RMSNorm(config.model_dim)
        self.attn = Attention(config, rngs)
        self.norm2 = RMSNorm(config.model_dim)
        self.mlp = MLP(config, rngs)
        self.residual = residual

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """(B, T, D) -> (B, T, D), dtype of the argument."""
        return self.follow(x_BxTxD, self.attn(self.norm1(x_BxTxD)))

    def follow(self, x_BxTxD: jax.Array, attended_BxTxD: jax.Array) -> jax.Array:
        """What the block makes of its input and of what attention makes of that."""
        x_BxTxD = x_BxTxD + self._part(attended_BxTxD)
        return x_BxTxD + self._part(self.mlp(self.norm2(x_BxTxD)))

    def _part(self, x_BxTxD: jax.Array) -> jax.Array:
        return x_BxTxD if self.residual == 1 else self.residual * x_BxTxD


class GPT(nnx.Module):
    """Decoder-only transformer with an untied, biased head and soft-capped logits.

    Parameter paths read "embed/embedding", "blocks/0/attn/q/kernel", "blocks/0/norm1/scale",
    "norm1/scale", "norm2/scale", "head/kernel", "head/bias".

    Example:
        >>> config = ModelConfig(vocab_size=64, num_layers=1, model_dim=16, head_dim=8, mlp_dim=64,
        ...                      sequence_length=4, dtype="float32", embed_dtype="float32")
        >>> GPT(config, nnx.Rngs(0))(jnp.zeros((2, 4), jnp.int32)).shape
        (2, 4, 64)
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Draws the weights from the `params` stream of `rngs`."""
        residual = 1 / config.depth_multiplier if config.transfer else 1.0
        config = config.scaled()
        self.embed = Embed(config, rngs)
        self.norm1 = RMSNorm(config.model_dim)
        self.blocks = nnx.List([Block(config, rngs, residual) for _ in range(config.num_layers)])
        self.norm2 = RMSNorm(config.model_dim)
        draw = functools.partial(init.linear, config.init, next_key=rngs.params)
        self.head = Linear(*draw("head", config.model_dim, config.vocab_size))
        if config.init == "record44":
            signs = init.gain_signs(
                len(self.blocks), config.model_dim, config.head_dim, rngs.params
            )
            for layer, (block, s) in enumerate(zip(self.blocks, signs, strict=True)):
                block.norm1.scale = nnx.Param(1 - init.GAIN * s)
                block.norm2.scale = nnx.Param(1 + init.GAIN * s)
                factor = init.depth_factor(layer, len(self.blocks))
                block.mlp.fc.kernel = nnx.Param(factor * block.mlp.fc.kernel[...])
        self.dtype, self.remat = config.dtype, config.remat

    def raw_logits(self, tokens_BxT: jax.Array) -> jax.Array:
        """Logits before the soft cap: (B, T) int32 -> (B, T, V) in the model's dtype."""
        x_BxTxD = self.norm1(self.embed(tokens_BxT).astype(self.dtype))
        apply = nnx.remat(Block.__call__) if self.remat else Block.__call__
        for block in self.blocks:
            x_BxTxD = apply(block, x_BxTxD)
        return self.head(self.norm2(x_BxTxD))

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Soft-capped logits: (B, T) int32 -> (B, T, V) float32."""
        return soft_cap(widen_exactly(self.raw_logits(tokens_BxT)))
