"""Text from a model, token by token, with the keys and values of what came before kept."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanogpt.model.gpt import ATTENTION_SCALE, GPT, soft_cap, widen_exactly


class Cache(NamedTuple):
    """Keys and values of every block, (L, B, S, N, H) each, for S positions."""

    keys: jax.Array
    values: jax.Array


def empty_cache(model: GPT, rows: int, length: int) -> Cache:
    """A cache for `length` positions of `rows` rows, in the model's precision."""
    attention = model.blocks[0].attn
    heads = attention.q.kernel.shape[1] // attention.head_dim
    shape = (len(model.blocks), rows, length, heads, attention.head_dim)
    return Cache(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype))


def extend(
    model: GPT, cache: Cache, tokens_BxT: jax.Array, start: jax.Array | int
) -> tuple[jax.Array, Cache]:
    """Logits of the next tokens, given those before them by their keys and values.

    Args:
        model: whose weights.
        cache: of positions 0 to start - 1; what it holds behind them is not read.
        tokens_BxT: int32, at positions start to start + T - 1.
        start: may be traced.

    Returns:
        Soft-capped logits (B, T, V) in float32, as the whole model gives them at these positions,
        and the cache with these tokens in it.

    Example:
        >>> from nanogpt.config.run import ModelConfig
        >>> config = ModelConfig(vocab_size=64, num_layers=1, model_dim=16, head_dim=8, mlp_dim=64,
        ...                      sequence_length=4, dtype="float32", embed_dtype="float32")
        >>> model = GPT(config, nnx.Rngs(0))
        >>> logits, cache = extend(model, empty_cache(model, 1, 4), jnp.zeros((1, 2), int), 0)
        >>> logits.shape, cache.keys.shape
        ((1, 2, 64), (1, 1, 4, 2, 8))
    """
    length = cache.keys.shape[2]
    seen = jnp.arange(length) <= start + jnp.arange(tokens_BxT.shape[1])[:, None]
    x_BxTxD = model.norm1(model.embed(tokens_BxT).astype(model.dtype))
    kept = []
    for block, *old in zip(model.blocks, *cache, strict=True):
        q_BxTxNxH, *new = block.attn.heads(block.norm1(x_BxTxD), start, length)
        both = [
            jax.lax.dynamic_update_slice_in_dim(o, n, start, 1)
            for o, n in zip(old, new, strict=True)
        ]
        out_BxTxNxH = jax.nn.dot_product_attention(
            q_BxTxNxH, *both, mask=seen[None, None], scale=ATTENTION_SCALE
        )
        x_BxTxD = block.follow(x_BxTxD, block.attn.proj(out_BxTxNxH.reshape(x_BxTxD.shape)))
        kept.append(both)
    raw_BxTxV = model.head(model.norm2(x_BxTxD))
    keys, values = (jnp.stack(part) for part in zip(*kept, strict=True))
    return soft_cap(widen_exactly(raw_BxTxV)), Cache(keys, values)


def draw(logits_V: jax.Array, key: jax.Array, temperature: float, top_k: int | None) -> jax.Array:
    """One token of softmax(logits / temperature), of the `top_k` likeliest; 0: the likeliest."""
    info = jnp.finfo(logits_V.dtype)
    if temperature < float(info.tiny):
        return jnp.argmax(logits_V)
    # Quotients that overflow would all be as likely: of differences from the largest none is +inf.
    scaled_V = (logits_V - logits_V.max()) / min(temperature, float(info.max))
    if top_k is not None:
        least = jax.lax.top_k(logits_V, min(top_k, len(logits_V)))[0][-1]
        scaled_V = jnp.where(logits_V < least, -jnp.inf, scaled_V)
    return jax.random.categorical(key, scaled_V)


def generate(
    graphdef: Any, params: Any, prompt: Sequence[int], *, length: int, vocab_size: int,
    temperature: float = 1.0, top_k: int | None = None, seed: int = 0,
) -> Iterator[int]:  # fmt: skip
    """Yields tokens that go on from a prompt, for ever.

    When `length` positions are full, the second half of them is read anew as the beginning of a
    context: the model never sees more than it was trained on.

    Args:
        graphdef: the model without its parameters, see `nanogpt.train.train_step.model_structure`.
        params: its parameters.
        prompt: ids, at least one.
        length: positions that the model was trained on.
        vocab_size: ids from there on are never drawn.
        temperature: 0 for the likeliest token, 1 for the model's distribution.
        top_k: how many of the likeliest tokens may be drawn; None for all.
        seed: of the draws.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, cache, tokens_T, start, last, key):
        model = nnx.merge(graphdef, params)
        logits_BxTxV, cache = extend(model, cache, tokens_T[None], start)
        return draw(logits_BxTxV[0, last, :vocab_size], key, temperature, top_k), cache

    context, key = list(prompt), jax.random.key(seed)
    cache = empty_cache(nnx.merge(graphdef, params), 1, length)
    known = 0  # positions in the cache
    while True:
        if len(context) > length:
            context, known = context[-max(length // 2, 1) :], 0
        new = context[known:]
        # A whole context in one program, whatever its length; what is behind it is not read.
        read = new if len(new) == 1 else new + [0] * (length - len(context))
        key, used = jax.random.split(key)
        tokens = np.asarray(read, np.int32)
        token, cache = step(params, cache, tokens, known, len(new) - 1, used)
        known = len(context)
        context.append(int(token))
        yield context[-1]
