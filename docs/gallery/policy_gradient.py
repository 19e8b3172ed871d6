"""A policy gradient balances a pole: REINFORCE on the equations of cart-pole.

Rollouts and updates are one compiled loop. Equations: Barto, Sutton and Anderson 1983; an episode
ends at 12 degrees, at 2.4 m, or after 200 steps.

Run it: python docs/gallery/policy_gradient.py
It printed: AdamW 191, Shampoo 189 steps an episode on the way
"""

import jax
import jax.numpy as jnp
import optax

import shampoo_jax

OPTIMIZERS = {"AdamW": (optax.adamw, 3e-2), "Shampoo": (shampoo_jax.shampoo, 3e-2)}
LIMIT, SIZES = 200, {"w1": (4, 32), "w2": (32, 32), "w3": (32, 2)}


def move(state, force):
    """Position, speed, angle and angular speed 0.02 s later, in m, s and rad."""
    _, speed, angle, spin = state
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    push = (force + 0.05 * spin**2 * sin) / 1.1  # cart 1 kg, pole 0.1 kg, half of it 0.5 m
    turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    return state + 0.02 * jnp.array([speed, push - 0.05 * turn * cos / 1.1, spin, turn])


def logits(params, state):
    return jnp.tanh(jnp.tanh(state @ params["w1"]) @ params["w2"]) @ params["w3"]


def episode(params, key):
    """States (T, 4), actions (T,), and whether the pole still stood (T,), of T steps."""

    def step(carry, key):
        state, standing = carry
        action = jax.random.categorical(key, logits(params, state))
        after = move(state, 20.0 * action - 10.0)
        fine = (jnp.abs(after[0]) < 2.4) & (jnp.abs(after[2]) < 12 * jnp.pi / 180)
        return (after, standing & fine), (state, action, standing)

    start = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
    return jax.lax.scan(step, (start, True), jax.random.split(key, LIMIT))[1]


def surrogate(params, states, actions, standing):
    """Its gradient is the policy gradient; the baseline is the mean return of each moment."""
    left = jnp.cumsum(standing[:, ::-1], axis=1)[:, ::-1]  # steps that the pole will stand
    advantage = (left - left.mean(0)) / (left.std() + 1e-6) * standing
    chances = jax.nn.log_softmax(logits(params, states))
    chosen = jnp.take_along_axis(chances, actions[..., None], -1)[..., 0]
    return -jnp.sum(advantage * chosen) / standing.sum()


def main(small=False, seed=0):
    steps, lengths = 20 if small else 50, {}
    *starts, key = jax.random.split(jax.random.key(seed), 4)
    pairs, normal = zip(starts, SIZES.items(), strict=True), jax.nn.initializers.lecun_normal()
    params = {name: normal(start, size) for start, (name, size) in pairs}
    for name, (make, rate) in OPTIMIZERS.items():
        tx = make(rate)

        def step(carry, key, tx=tx):
            params, state = carry
            rollouts = jax.vmap(episode, (None, 0))(params, jax.random.split(key, 32))
            updates, state = tx.update(jax.grad(surrogate)(params, *rollouts), state, params)
            return (optax.apply_updates(params, updates), state), rollouts[2].sum(1).mean()

        train = jax.jit(lambda *scanned, step=step: jax.lax.scan(step, *scanned)[1])
        lengths[name] = float(train((params, tx.init(params)), jax.random.split(key, steps)).mean())
    print(
        ", ".join(f"{name} {x:.0f}" for name, x in lengths.items()), "steps an episode on the way"
    )
    return lengths


if __name__ == "__main__":
    main()
