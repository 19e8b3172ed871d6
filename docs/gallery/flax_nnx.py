"""Flax NNX: a convolutional network reads handwritten digits.

`nnx.Optimizer` takes Shampoo as it takes any Optax optimizer. Kernels of `nnx.Conv` are read as
matrices from all inputs of a window to the outputs; biases, and the layer that is called `head`,
are left to AdamW. Data: scikit-learn's 1,797 digits, the last 360 held out.

Run it: python docs/gallery/flax_nnx.py
It printed: AdamW 0.273, AdamW, errors 21, Shampoo 0.327, Shampoo, errors 29
"""

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import shampoo_jax

OPTIMIZERS = {"AdamW": (optax.adamw, 3e-2), "Shampoo": (shampoo_jax.shampoo, 3e-3)}


class Network(nnx.Module):
    """Two convolutions, one hidden layer, the head."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.dense = nnx.Linear(2 * 2 * 32, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        """Logits (N, 10) of images (N, 8, 8, 1)."""
        x = nnx.relu(self.conv1(images))
        x = nnx.relu(self.conv2(x))
        x = nnx.relu(self.dense(x.reshape(len(x), -1)))
        return self.head(x)


def mean_loss(model, images, labels):
    """Cross-entropy in nats."""
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels):
    """One step, in place."""
    loss, gradients = nnx.value_and_grad(mean_loss)(model, images, labels)
    optimizer.update(model, gradients)
    return loss


def main(small=False, seed=0):
    """Held-out losses and errors by optimizer."""
    steps, losses = 20 if small else 200, {}
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    for name, (make, rate) in OPTIMIZERS.items():
        model, rng = Network(nnx.Rngs(seed)), np.random.default_rng(seed)
        tx = make(optax.cosine_decay_schedule(rate, steps))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for _ in range(steps):
            batch = rng.integers(1437, size=128)
            train_step(model, optimizer, images[batch], labels[batch])
        losses[name] = float(mean_loss(model, images[1437:], labels[1437:]))
        wrong = model(images[1437:]).argmax(-1) != labels[1437:]
        losses[f"{name}, errors"] = float(wrong.sum())
    print(", ".join(f"{name} {x:.3g}" for name, x in losses.items()))
    return losses


if __name__ == "__main__":
    main()
