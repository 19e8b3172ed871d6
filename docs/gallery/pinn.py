"""A physics-informed network solves the Helmholtz equation; the exact solution is known.

u_xx + u_yy + u = f on [-1, 1]^2, u = 0 on the border; f is such that u = sin(pi x) sin(4 pi y).
A loss of second derivatives is ill-conditioned, and its two terms pull in different directions.

Run it: python docs/gallery/pinn.py
It printed: AdamW 0.8803, Shampoo 0.0655, SOAP 0.0363, KL-Shampoo 0.1298 relative error
"""

import jax
import jax.numpy as jnp
import optax

import shampoo_jax

OPTIMIZERS = {
    "AdamW": (optax.adamw, 3e-3),
    "Shampoo": (shampoo_jax.shampoo, 1e-2),
    "SOAP": (shampoo_jax.soap, 3e-2),
    "KL-Shampoo": (shampoo_jax.kl_shampoo, 1e-2),
}
FREQUENCIES = jnp.pi * jnp.array([1.0, 4.0])
SIZES = ((2, 32), (32, 32), (32, 32), (32, 1))


def exact(point):
    return jnp.sin(FREQUENCIES * point).prod()


def network(params, point):
    for layer in params[:-1]:
        point = jnp.tanh(point @ layer["w"] + layer["b"])
    return (point @ params[-1]["w"] + params[-1]["b"])[0]


def residual(params, point):
    laplacian = jnp.trace(jax.hessian(network, argnums=1)(params, point))
    force = (1 - jnp.sum(FREQUENCIES**2)) * exact(point)
    return laplacian + network(params, point) - force


def mean_loss(params, key):
    """Squares of the residual at points inside and of u at points on the border, new ones a key."""
    inside, along = jax.random.uniform(key, (2, 128, 2), minval=-1, maxval=1)
    left_right, down_up = along[:64], along[64:]
    left_right = left_right.at[:, 0].set(jnp.sign(left_right[:, 0]))
    down_up = down_up.at[:, 1].set(jnp.sign(down_up[:, 1]))
    border = jnp.concatenate([left_right, down_up])
    inner = jax.vmap(residual, (None, 0))(params, inside)
    outer = jax.vmap(network, (None, 0))(params, border)
    return jnp.mean(inner**2) + 100 * jnp.mean(outer**2)


def train(tx, params, keys):
    def step(carry, key):
        params, state = carry
        updates, state = tx.update(jax.grad(mean_loss)(params, key), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), keys)[0][0])(params)


def main(small=False, seed=0):
    steps, normal = 200 if small else 1000, jax.nn.initializers.glorot_normal()
    *starts, key = jax.random.split(jax.random.key(seed), 5)
    pairs, keys = zip(starts, SIZES, strict=True), jax.random.split(key, steps)
    params = [{"w": normal(k, size), "b": jnp.zeros(size[1])} for k, size in pairs]
    grid = jnp.stack(jnp.meshgrid(*2 * [jnp.linspace(-1, 1, 64)]), -1).reshape(-1, 2)
    truth, errors = jax.vmap(exact)(grid), {}
    for name, (make, rate) in OPTIMIZERS.items():
        found = train(make(optax.cosine_decay_schedule(rate, steps)), params, keys)
        missed = jax.vmap(network, (None, 0))(found, grid) - truth
        errors[name] = float(jnp.linalg.norm(missed) / jnp.linalg.norm(truth))
    print(", ".join(f"{name} {x:.4f}" for name, x in errors.items()), "relative error")
    return errors


if __name__ == "__main__":
    main()
