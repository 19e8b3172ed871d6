"""Every optimizer of the small board takes finite, repeatable steps and keeps only arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanogpt.config.presets import PRESETS, preset
from nanogpt.optimizers.build import build_optimizer

RNG = np.random.default_rng(0)
PATHS = {"square": (8, 8), "tall": (12, 4), "wide": (4, 12)}
PARAMS = {
    "blocks": {"0": {"mlp": {k: {"kernel": RNG.normal(size=s)} for k, s in PATHS.items()}}},
    "head": {"kernel": np.zeros((8, 5)), "bias": np.zeros(5)},
}
PARAMS = jax.tree.map(jnp.float32, PARAMS)
TARGET = jax.tree.map(lambda p: p + 1.0, PARAMS)


def loss(params):
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(TARGET), strict=True)
    return 100 * sum(jnp.sum(jnp.cosh(p - t)) for p, t in pairs)


@pytest.mark.parametrize("name", PRESETS["board"])
def test_four_steps_lower_a_loss(name):
    """The first gradient is zero, as that of most matrices in the benchmark."""
    tx = build_optimizer(preset("board", name), PARAMS)

    @jax.jit
    def train():
        def step(carry, s):
            params, state = carry
            gradient = jax.tree.map(lambda g: g * (s > 0), jax.grad(loss)(params))
            updates, state = tx.update(gradient, state, params, obj_fn=loss)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), jnp.arange(5))[0]

    params, state = train()
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((params, state)))
    assert loss(params) < loss(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, (params, state), train())
