"""A whole training in one `lax.scan`: a deep autoencoder of digits.

State and parameters are a carry like any other, so the loop is one compiled program. Deep
autoencoders are the classic test of second-order methods. Parameters are plain dictionaries. Data:
scikit-learn's 1,797 digits, the last 360 held out.

Run it: python docs/gallery/scan_loop.py
It printed: AdamW 1.427, Shampoo 0.997, SOAP 0.924 squared error a digit
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import shampoo_jax

OPTIMIZERS = {
    "AdamW": (optax.adamw, 1e-2),
    "Shampoo": (shampoo_jax.shampoo, 1e-2),
    "SOAP": (shampoo_jax.soap, 1e-2),
}
WIDTHS = (64, 64, 64, 32, 8, 32, 64, 64, 64)
CODE = 3  # the layer whose outputs are the code; it and the last are linear


def init(key):
    """One dictionary of `w` and `b` a layer."""
    keys, normal = jax.random.split(key, len(WIDTHS) - 1), jax.nn.initializers.lecun_normal()
    sizes = zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    return [{"w": normal(key, (m, n)), "b": jnp.zeros(n)} for key, m, n in sizes]


def mean_loss(params, pixels):
    """Squared error of a reconstruction, summed over the 64 pixels."""
    x = pixels
    for k, layer in enumerate(params):
        x = x @ layer["w"] + layer["b"]
        x = x if k in (CODE, len(params) - 1) else jnp.tanh(x)
    return jnp.mean(jnp.sum((x - pixels) ** 2, axis=1))


def train(tx, params, pixels, keys):
    """Parameters after one step a key, of 256 digits each, and the losses on the way."""

    def step(carry, key):
        params, state = carry
        batch = pixels[jax.random.randint(key, (256,), 0, len(pixels))]
        loss, gradients = jax.value_and_grad(mean_loss)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), keys)
    return params, losses


def main(small=False, seed=0):
    """Held-out errors by optimizer."""
    steps, errors = 50 if small else 500, {}
    pixels = jnp.float32(load_digits().data / 16)
    start, *keys = jax.random.split(jax.random.key(seed), steps + 1)
    for name, (make, rate) in OPTIMIZERS.items():
        tx = make(optax.cosine_decay_schedule(rate, steps))
        run = jax.jit(train, static_argnums=0)
        params, _ = run(tx, init(start), pixels[:1437], jnp.stack(keys))
        errors[name] = float(mean_loss(params, pixels[1437:]))
    print(", ".join(f"{name} {x:.3f}" for name, x in errors.items()), "squared error a digit")
    return errors


if __name__ == "__main__":
    main()
