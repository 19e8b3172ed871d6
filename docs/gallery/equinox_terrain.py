"""Equinox: a network learns the height of the Earth's surface as a function of place.

Regression on coordinates is ill-conditioned. The optimizer gets the model's arrays alone, by
`eqx.filter`; a `weight` of `eqx.nn.Linear` is a matrix, its `bias` goes to AdamW. Data: elevations
of the Jacksboro fault, which Matplotlib ships.

Run it: python docs/gallery/equinox_terrain.py
It printed: AdamW 0.2199, Shampoo 0.1735, SOAP 0.1651, KL-Shampoo 0.2127 of the variance unexplained
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import cbook

import shampoo_jax

OPTIMIZERS = {
    "AdamW": (optax.adamw, 3e-2),
    "Shampoo": (shampoo_jax.shampoo, 3e-2),
    "SOAP": (shampoo_jax.soap, 3e-2),
    "KL-Shampoo": (shampoo_jax.kl_shampoo, 3e-2),
}


def terrain():
    """Places (N, 2) in [-1, 1] and their heights (N,), with mean 0 and variance 1."""
    height = cbook.get_sample_data("jacksboro_fault_dem.npz")["elevation"][::4, ::4]
    axes = [np.linspace(-1, 1, n) for n in height.shape]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    height = height.ravel().astype(np.float32)
    return jnp.float32(places), jnp.array((height - height.mean()) / height.std())


def mean_loss(model, places, heights):
    """Share of the heights' variance that is not explained."""
    return jnp.mean((jax.vmap(model)(places) - heights) ** 2)


def train(tx, model, places, heights, keys):
    """The model after one step a key, of 512 places each."""

    @eqx.filter_jit
    def step(model, state, key):
        batch = jax.random.randint(key, (512,), 0, len(places))
        gradients = eqx.filter_grad(mean_loss)(model, places[batch], heights[batch])
        updates, state = tx.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    for key in keys:
        model, state = step(model, state, key)
    return model


def main(small=False, seed=0):
    """Unexplained variance by optimizer."""
    steps, losses = 30 if small else 500, {}
    places, heights = terrain()
    for name, (make, rate) in OPTIMIZERS.items():
        model = eqx.nn.MLP(2, "scalar", 32, 4, jnp.tanh, key=jax.random.key(seed))
        tx = make(optax.cosine_decay_schedule(rate, steps))
        model = train(tx, model, places, heights, jax.random.split(jax.random.key(seed), steps))
        losses[name] = float(mean_loss(model, places, heights))
    print(", ".join(f"{name} {x:.4f}" for name, x in losses.items()), "of the variance unexplained")
    return losses


if __name__ == "__main__":
    main()
