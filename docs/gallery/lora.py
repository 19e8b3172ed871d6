"""LoRA: adapters of rank 4 teach a model of old prose the new.

A small model learns presidents' messages up to 1899; then adapters of its matrices learn those from
1950 on. The optimizer gets the adapters alone.

Run it: python docs/gallery/lora.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shampoo_jax
from data_pipeline import gpt2, sotu

OPTIMIZERS = {"AdamW": (optax.adamw, 1e-2), "Shampoo": (shampoo_jax.shampoo, 1e-2)}
VOCABULARY, CONTEXT, WIDTH, RANK = 512, 8, 8, 4
SIZES = {"up": (CONTEXT * WIDTH, 64), "middle": (64, 64), "down": (64, WIDTH)}


def init(key):
    keys, normal = iter(jax.random.split(key, 8)), jax.nn.initializers.lecun_normal()
    model = {name: normal(next(keys), size) for name, size in SIZES.items()}
    model["embed"] = jax.random.normal(next(keys), (VOCABULARY, WIDTH))
    model["head"] = normal(next(keys), (WIDTH, VOCABULARY))
    return model, {
        name: {"lora_a": normal(next(keys), (m, RANK)), "lora_b": jnp.zeros((RANK, n))}
        for name, (m, n) in SIZES.items()
    }


def mean_loss(model, pairs, rows):
    """Nats per token at the end of each row."""
    x = model["embed"][rows[:, :-1]].reshape(len(rows), -1)
    for name in SIZES:
        x = x @ model[name] + x @ pairs[name]["lora_a"] @ pairs[name]["lora_b"]
        x = jax.nn.gelu(x) if name != "down" else x
    logits = x @ model["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, -1]).mean()


def windows(years, split, count, rng):
    """Random stretches of CONTEXT + 1 tokens from messages of some years."""
    texts = [d for d in sotu().documents() if d.split == split]
    texts = [d.text for d in texts if int(d.name[:4]) in years]
    tokens = np.concatenate([gpt2(VOCABULARY).encode(text) for text in texts[:20]])
    return tokens[rng.integers(len(tokens) - CONTEXT, size=(count, 1)) + np.arange(CONTEXT + 1)]


def train(tx, loss, params, batches):
    def step(carry, rows):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), batches)[0][0])(params)


def main(small=False, seed=0):
    steps, rng = 30 if small else 200, np.random.default_rng(seed)
    model, pairs = init(jax.random.key(seed))
    old = windows(range(1790, 1900), "train", steps * 256, rng).reshape(steps, 256, -1)
    new = windows(range(1950, 2100), "train", steps * 256, rng).reshape(steps, 256, -1)
    held_out = windows(range(1950, 2100), "val", 4096, rng)
    model = train(optax.adamw(1e-2), lambda m, x: mean_loss(m, pairs, x), model, old)
    losses = {"before": float(mean_loss(model, pairs, held_out))}
    for name, (make, rate) in OPTIMIZERS.items():
        tx = make(optax.cosine_decay_schedule(rate, steps))
        adapted = train(tx, lambda p, x: mean_loss(model, p, x), pairs, new)
        losses[name] = float(mean_loss(model, adapted, held_out))
    print(", ".join(f"{name} {x:.3f}" for name, x in losses.items()), "nats per held-out token")
    return losses


if __name__ == "__main__":
    main()
