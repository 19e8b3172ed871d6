"""Keras 3 on JAX: a network with batch normalization reads handwritten digits.

Keras has optimizers of its own, so Optax's go into a loop over `model.stateless_call`. Keys are the
paths of the variables, `sequential/dense/kernel` say: by them Shampoo knows which are matrices, and
that `head` is left to AdamW. A list of values would have no names. Data: scikit-learn's 1,797
digits, the last 360 held out.

Run it: python docs/gallery/keras_digits.py
It printed: AdamW 0.288, AdamW, errors 32, Shampoo 0.246, Shampoo, errors 28
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
import optax
from keras import layers
from sklearn.datasets import load_digits

import shampoo_jax

OPTIMIZERS = {"AdamW": (optax.adamw, 1e-2), "Shampoo": (shampoo_jax.shampoo, 3e-3)}


def make_model(seed):
    keras.utils.set_random_seed(seed)
    middle = [layers.Dense(64), layers.BatchNormalization(), layers.ReLU()]
    return keras.Sequential([keras.Input((64,)), *middle, layers.Dense(10, name="head")])


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(tx, model, pixels, labels, batches):
    """Trains the model in place."""

    def mean_loss(params, others, pixels, labels):
        values = [params[v.path] for v in model.trainable_variables]
        logits, others = model.stateless_call(values, others, pixels, training=True)
        return cross_entropy(logits, labels), others

    @jax.jit
    def step(params, others, state, pixels, labels):
        gradients, others = jax.grad(mean_loss, has_aux=True)(params, others, pixels, labels)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), others, state

    params = {v.path: v.value for v in model.trainable_variables}
    others, state = [v.value for v in model.non_trainable_variables], tx.init(params)
    for batch in batches:
        params, others, state = step(params, others, state, pixels[batch], labels[batch])
    for v in model.trainable_variables:
        v.assign(params[v.path])
    for v, value in zip(model.non_trainable_variables, others, strict=True):
        v.assign(value)


def main(small=False, seed=0):
    steps, losses = 20 if small else 200, {}
    pixels, labels = load_digits(return_X_y=True)
    pixels = np.float32(pixels / 16)
    batches = np.random.default_rng(seed).integers(1437, size=(steps, 128))
    for name, (make, rate) in OPTIMIZERS.items():
        model = make_model(seed)
        train(make(optax.cosine_decay_schedule(rate, steps)), model, pixels, labels, batches)
        logits = model(pixels[1437:], training=False)
        losses[name] = float(cross_entropy(logits, labels[1437:]))
        losses[f"{name}, errors"] = float((logits.argmax(-1) != labels[1437:]).sum())
    print(", ".join(f"{name} {x:.3g}" for name, x in losses.items()))
    return losses


if __name__ == "__main__":
    main()
