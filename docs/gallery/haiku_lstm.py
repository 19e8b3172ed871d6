"""Haiku: a recurrent network reads handwritten digits row by row.

`hk.transform` gives a dictionary of modules, which Shampoo takes as it is: `w` of `hk.LSTM` is a
matrix of inputs and state to all four gates, `b` goes to AdamW, and so does a module named `head`.
Data: scikit-learn's 1,797 digits, the last 360 held out.

Run it: python docs/gallery/haiku_lstm.py
It printed: AdamW 0.269, AdamW, errors 29, Shampoo 0.243, Shampoo, errors 21
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import shampoo_jax

OPTIMIZERS = {"AdamW": (optax.adamw, 1e-1), "Shampoo": (shampoo_jax.shampoo, 1e-1)}


def network(images):
    """Logits (N, 10) of images (N, 8, 8) from the state behind the last row."""
    rows = jnp.swapaxes(images, 0, 1)
    core = hk.LSTM(32)
    outputs, _ = hk.dynamic_unroll(core, rows, core.initial_state(images.shape[0]))
    return hk.Linear(10, name="head")(outputs[-1])


model = hk.without_apply_rng(hk.transform(network))


def mean_loss(params, images, labels):
    """Cross-entropy in nats."""
    logits = model.apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main(small=False, seed=0):
    """Held-out losses and errors by optimizer."""
    steps = 20 if small else 200
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8)
    losses = {}
    for name, (make, rate) in OPTIMIZERS.items():
        tx, rng = make(optax.cosine_decay_schedule(rate, steps)), np.random.default_rng(seed)

        @jax.jit
        def step(params, state, images, labels, tx=tx):
            gradients = jax.grad(mean_loss)(params, images, labels)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        params = model.init(jax.random.key(seed), images[:1])
        state = tx.init(params)
        for _ in range(steps):
            batch = rng.integers(1437, size=128)
            params, state = step(params, state, images[batch], labels[batch])
        losses[name] = float(mean_loss(params, images[1437:], labels[1437:]))
        wrong = model.apply(params, images[1437:]).argmax(-1) != labels[1437:]
        losses[f"{name}, errors"] = float(wrong.sum())
    print(", ".join(f"{name} {x:.3g}" for name, x in losses.items()))
    return losses


if __name__ == "__main__":
    main()
