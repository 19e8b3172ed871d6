"""Steps outside of jit: one program, compiled at the first of them, and nothing left behind."""

import gc

import jax
import jax.numpy as jnp
import pytest

import shampoo_jax as sj

COMPILED = "/jax/core/compile/backend_compile_duration"
SEEN: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: SEEN.append(event))

PARAMS = {"embed": jnp.ones((5, 2)), "w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
GRADIENTS = [jax.tree.map(lambda p, i=i: p + i, PARAMS) for i in range(2)]


def held() -> int:
    gc.collect()
    return len(gc.get_objects())


def injected(learning_rate):
    return sj.inject_hyperparams(sj.shampoo)(learning_rate, weight_decay=0.1)


@pytest.mark.parametrize("alias", [sj.soap, sj.kl_shampoo, injected])
def test_later_steps_compile_nothing_and_keep_nothing(alias):
    tx = alias(1e-3)
    state, counts, objects, arrays = tx.init(PARAMS), [], [], []
    for step in range(12):
        before = SEEN.count(COMPILED)
        _, state = tx.update(GRADIENTS[step % 2], state, PARAMS)
        counts.append(SEEN.count(COMPILED) - before)
        if step in (3, 11):
            objects.append(held())
            arrays.append(len(jax.live_arrays()))
    assert counts[0] > 0  # or the listener hears nothing
    assert counts[1:] == [0] * 11
    assert arrays[1] == arrays[0]
    assert objects[1] - objects[0] < 40  # 8 steps that each kept a closure hold hundreds
