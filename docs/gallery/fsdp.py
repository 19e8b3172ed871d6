"""Parameters split over eight devices (FSDP): one device's loss up to rounding, less state on each.

`Placement` names the mesh, the axis over which blocks are split, and how parameters lie; the rest
of the loop is that of one device. Eight fake devices stand in. Task: a deep autoencoder of digits.

Run it: python docs/gallery/fsdp.py
It printed: AdamW: error 1.288, 213 kB of state a device
Shampoo: error 0.76674, 676 kB of state a device
Shampoo on 8: error 0.76209, 142 kB of state a device
"""

import itertools
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("NPROC", "32")  # threads of XLA: with fewer than devices it may starve

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import shampoo_jax

OPTIMIZERS = {"AdamW": (optax.adamw, 1e-2), "Shampoo": (shampoo_jax.shampoo, 1e-2)}
WIDTHS = (64, 64, 64, 64, 16, 64, 64, 64, 64)


def rows_split(path, leaf):
    return PartitionSpec("fsdp")


def mean_loss(params, pixels):
    """Squared error of a reconstruction, summed over the 64 pixels."""
    x = pixels
    for weight in params[:-1]:
        x = jnp.tanh(x @ weight)
    return jnp.mean(jnp.sum((x @ params[-1] - pixels) ** 2, axis=1))


def train(tx, params, batches):
    """Parameters and state after one step a batch."""

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(mean_loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for batch in batches:
        params, state = step(params, state, batch)
    return params, state


def main(small=False, seed=0):
    steps, results = 5 if small else 100, {}
    pixels = np.float32(load_digits().data / 16)
    batches = pixels[np.random.default_rng(seed).integers(1437, size=(steps, 256))]
    keys, normal = jax.random.split(jax.random.key(seed), 8), jax.nn.initializers.lecun_normal()
    params = [normal(*pair) for pair in zip(keys, itertools.pairwise(WIDTHS), strict=True)]
    mesh = jax.make_mesh((8,), ("fsdp",), (AxisType.Auto,))
    placement = shampoo_jax.Placement(mesh, owners="fsdp", parameter_spec=rows_split)
    split = jax.device_put(params, NamedSharding(mesh, PartitionSpec("fsdp")))
    split_batches = jax.device_put(batches, NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    runs = {name: (make(rate), params, batches) for name, (make, rate) in OPTIMIZERS.items()}
    tx = shampoo_jax.shampoo(OPTIMIZERS["Shampoo"][1], placement=placement)
    for name, run in {**runs, "Shampoo on 8": (tx, split, split_batches)}.items():
        trained, state = train(*run)
        results[name] = float(mean_loss(trained, pixels[1437:]))
        first = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)]
        results[f"{name}, kB of state a device"] = sum(first) / 1e3
        print(f"{name}: error {results[name]:.5g}, {sum(first) / 1e3:.0f} kB of state a device")
    return results


if __name__ == "__main__":
    main()
