"""The model of the medium track: 454M parameters, layers that differ from each other.

Beside blocks of attention and MLP it has three value embeddings that are mixed into values of the
first and the last layers, skips from early layers to late ones, a mix of the stream with its start
before every block, all with learned scalars, a layer without attention, and attention within
documents and a window. Kernels are stored (in, out), queries, keys, values and projection apart.

Source of every constant: KellerJordan/modded-nanogpt, records/track_2_medium, 2025-04-22_Record8.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from nanogpt.config.run import ModelConfig
from nanogpt.model import init, windows
from nanogpt.model.gpt import (
    ATTENTION_SCALE,
    MLP,
    Embed,
    Linear,
    rms_norm,
    rotary_frequencies,
    soft_cap,
    turn,
    widen_exactly,
)

LONG = (0, 4, 11, 15)  # layers with the whole window; the others have half of it
WITHOUT_ATTENTION = 7
SKIPS = {9: 6, 10: 4, 11: 2}  # to a layer's input, from another one's output
VALUES = {0: 0, 1: 1, 2: 2, 13: 0, 14: 1, 15: 2}  # layer: its value embedding


class Place(NamedTuple):
    """Where tokens stand: what attention has to know beside queries, keys and values."""

    documents_BxT: jax.Array  # int32, see `windows.documents`
    window: jax.Array  # int32, blocks that layers of `LONG` see
    tables: tuple[jax.Array, jax.Array]  # of the rotary embedding


def mix(*terms: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Sum of float32 scalars times arrays, in float32, rounded once to the arrays' dtype."""
    total = sum(scalar * widen_exactly(x) for scalar, x in terms)
    return jnp.asarray(total).astype(terms[0][1].dtype)


class MediumAttention(nnx.Module):
    """Self-attention with normalized queries, keys and values, within documents and a window."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, layer: int):
        draw = functools.partial(init.linear, config.init, next_key=rngs.params)
        width = config.model_dim
        self.q, self.k, self.v = (Linear(*draw("qkv", width, width)) for _ in range(3))
        self.proj = Linear(*draw("attn_proj", width, width))
        self.head_dim, self.long = config.head_dim, layer in LONG
        block = {"block": config.mask_block, "most": config.window // config.mask_block}
        ways = {
            "dense": windows.attend_dense,
            "xla": functools.partial(windows.attend_banded, twice=True),
            "auto": windows.attend_banded,
        }
        self.attend = functools.partial(ways[config.attention], scale=ATTENTION_SCALE, **block)

    def __call__(
        self, x_BxTxD: jax.Array, scalars: jax.Array, value_BxTxD: jax.Array | None, place: Place
    ) -> jax.Array:
        """(B, T, D) -> (B, T, D), dtype of the argument."""
        heads = (*x_BxTxD.shape[:2], -1, self.head_dim)
        q, k, v = (rms_norm(f(x_BxTxD).reshape(heads)) for f in (self.q, self.k, self.v))
        terms = [(scalars[0], v)]
        if value_BxTxD is not None:
            terms.append((scalars[1], value_BxTxD.reshape(heads)))
        q, k = turn(q, place.tables), turn(k, place.tables)
        window = place.window if self.long else place.window // 2
        out = self.attend(q, k, mix(*terms), place.documents_BxT, window)
        return self.proj(out.reshape(x_BxTxD.shape))


class MediumBlock(nnx.Module):
    """A mix of the stream with its start, attention without a norm before it, and an MLP."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, layer: int):
        self.attn = None if layer == WITHOUT_ATTENTION else MediumAttention(config, rngs, layer)
        self.mlp = MLP(config, rngs)
        toward_zero = config.kernel_rounding == "toward_zero"
        attn = self.attn
        linears = [] if attn is None else [attn.q, attn.k, attn.v, attn.proj]
        for linear in (*linears, self.mlp.fc, self.mlp.proj):
            linear.toward_zero = toward_zero
            if toward_zero:  # what is cut begins as what bfloat16 holds
                linear.kernel = nnx.Param(linear.kernel[...].astype("bfloat16").astype("float32"))

    def __call__(
        self,
        x_BxTxD: jax.Array,
        start_BxTxD: jax.Array,
        scalars: tuple[jax.Array, jax.Array],
        value_BxTxD: jax.Array | None,
        place: Place,
    ) -> jax.Array:
        """(B, T, D) -> (B, T, D), dtype of the argument."""
        of_stream, of_value = scalars
        x_BxTxD = mix((of_stream[0], x_BxTxD), (of_stream[1], start_BxTxD))
        if self.attn is not None:
            x_BxTxD = x_BxTxD + self.attn(x_BxTxD, of_value, value_BxTxD, place)
        return x_BxTxD + self.mlp(rms_norm(x_BxTxD))


class MediumGPT(nnx.Module):
    """The medium track's decoder; logits are soft-capped, those of ids beyond the vocabulary too.

    Parameter paths read "embed/embedding", "value_embeds/0/embedding", "blocks/0/attn/q/kernel",
    "blocks/0/mlp/fc/kernel", "head/kernel" and "scalars": a factor of each layer's output where it
    is a skip, then of stream and start before each block, then of each layer's values and of the
    value embedding.

    Example:
        >>> config = ModelConfig(vocab_size=60, num_layers=16, model_dim=16, head_dim=8, mlp_dim=64,
        ...                      sequence_length=8, mask_block=4, window=8, head_columns=64,
        ...                      end_of_text=59, kind="medium", init="medium", dtype="float32")
        >>> MediumGPT(config, nnx.Rngs(0))(jnp.zeros((2, 8), jnp.int32), jnp.int32(1)).shape
        (2, 8, 64)
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """Draws the weights from the `params` stream of `rngs`."""
        config = config.scaled()
        self.embed = Embed(config, rngs)
        self.value_embeds = nnx.List(
            [Embed(config, rngs) for _ in range(len(set(VALUES.values())))]
        )
        layers = range(config.num_layers)
        self.blocks = nnx.List([MediumBlock(config, rngs, layer) for layer in layers])
        columns = config.head_columns or config.vocab_size
        draw = functools.partial(init.linear, config.init, next_key=rngs.params)
        self.head = Linear(*draw("head", config.model_dim, columns))
        parts = [[1.0], [1.0, 0.0], [0.5, 0.5]]
        self.scalars = nnx.Param(jnp.concatenate([jnp.array(p * len(layers)) for p in parts]))
        self.config = config

    def streams(self, tokens_BxT: jax.Array, window: jax.Array) -> list[jax.Array]:
        """The residual stream after each block: (B, T) int32, blocks -> (B, T, D) each."""
        place = self._place(tokens_BxT, window)
        dtype, layers = self.config.dtype, len(self.blocks)
        x = start = rms_norm(self.embed(tokens_BxT).astype(dtype))
        values = [embed(tokens_BxT).astype(dtype) for embed in self.value_embeds]
        skips, *pairs = jnp.split(self.scalars[...], (layers, 3 * layers))
        of_stream, of_value = (pair.reshape(layers, 2) for pair in pairs)
        apply = nnx.remat(MediumBlock.__call__) if self.config.remat else MediumBlock.__call__
        out: list[jax.Array] = []
        for layer, block in enumerate(self.blocks):
            if layer in SKIPS:
                x = mix((jnp.float32(1), x), (skips[SKIPS[layer]], out[SKIPS[layer]]))
            value = values[VALUES[layer]] if layer in VALUES else None
            x = apply(block, x, start, (of_stream[layer], of_value[layer]), value, place)
            out.append(x)
        return out

    def _place(self, tokens_BxT: jax.Array, window: jax.Array) -> Place:
        at = jnp.arange(tokens_BxT.shape[1], dtype=jnp.float32)[:, None]
        angles = at * rotary_frequencies(self.config.head_dim)
        owners = windows.documents(tokens_BxT, self.config.end_of_text)
        return Place(owners, jnp.asarray(window), (jnp.cos(angles), jnp.sin(angles)))

    def raw_logits(self, tokens_BxT: jax.Array, window: jax.Array) -> jax.Array:
        """Logits before the soft cap.

        Args:
            tokens_BxT: int32.
            window: int32, blocks that a query of the longer layers sees.

        Returns:
            (B, T, head_columns) in the model's dtype.
        """
        return self.head(rms_norm(self.streams(tokens_BxT, window)[-1]))

    def __call__(self, tokens_BxT: jax.Array, window: jax.Array) -> jax.Array:
        """Soft-capped logits: (B, T) int32, blocks -> (B, T, head_columns) float32."""
        return soft_cap(widen_exactly(self.raw_logits(tokens_BxT, window)))


def unused_scalars(layers: int = 16) -> list[int]:
    """Places in "scalars" of those that no output depends on."""
    skips = [i for i in range(layers) if i not in SKIPS.values()]
    first = [3 * layers + 2 * WITHOUT_ATTENTION]
    second = [3 * layers + 2 * i + 1 for i in range(layers) if i not in VALUES]
    return sorted({*skips, *first, *second})
