"""Ensembles by `vmap`: learning rates and seeds, trained side by side in one program.

`init` and `update` of every optimizer can be mapped, and a learning rate may be a traced number: a
sweep needs no loop. Each member is what a run of its own gives. The task: scikit-learn's 1,797
digits, the last 360 held out.

Run it: python docs/gallery/ensemble.py
It printed: AdamW: 0.47 at 0.003, 0.37 at 0.01, 0.42 at 0.03
Shampoo: 0.33 at 0.003, 0.37 at 0.01, 0.58 at 0.03
"""

import functools

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import shampoo_jax

OPTIMIZERS = {"AdamW": optax.adamw, "Shampoo": shampoo_jax.shampoo}
SIZES = {"w1": (64, 32), "w2": (32, 32), "head": (32, 10)}


def mean_loss(params, pixels, labels):
    """Nats per digit of a network with two hidden layers."""
    x = jnp.tanh(pixels @ params["w1"] + params["b1"])
    x = jnp.tanh(x @ params["w2"] + params["b2"])
    logits = x @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(make, steps, data, seed, rate):
    """Loss on the held-out digits after so many steps, for one seed and one learning rate."""
    pixels, labels = data
    *starts, key = jax.random.split(jax.random.key(seed), 4)
    pairs, normal = zip(starts, SIZES.items(), strict=True), jax.nn.initializers.lecun_normal()
    params = {name: normal(start, size) for start, (name, size) in pairs}
    params |= {"b1": jnp.zeros(32), "b2": jnp.zeros(32)}
    tx = make(learning_rate=rate)

    def step(carry, key):
        params, state = carry
        batch = jax.random.randint(key, (128,), 0, 1437)
        gradients = jax.grad(mean_loss)(params, pixels[batch], labels[batch])
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = params, tx.init(params)
    (params, _), _ = jax.lax.scan(step, carry, jax.random.split(key, steps))
    return mean_loss(params, pixels[1437:], labels[1437:])


def digits():
    pixels, labels = load_digits(return_X_y=True)
    return jnp.float32(pixels / 16), jnp.int32(labels)


def main(small=False, seed=0):
    """Mean losses over the seeds by optimizer and learning rate."""
    steps, count = (10, 2) if small else (100, 4)
    seeds, rates = jnp.arange(seed, seed + count), jnp.array([3e-3, 1e-2, 3e-2])
    losses = {}
    for name, make in OPTIMIZERS.items():
        run = functools.partial(train, make, steps, digits())
        grid = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))(seeds, rates)
        by_rate = {
            f"{rate:.1g}": mean.item() for rate, mean in zip(rates, grid.mean(0), strict=True)
        }
        print(f"{name}:", ", ".join(f"{mean:.2f} at {rate}" for rate, mean in by_rate.items()))
        losses |= {f"{name} at {rate}": mean for rate, mean in by_rate.items()}
    return losses


if __name__ == "__main__":
    main()
