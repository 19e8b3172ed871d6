"""`as_optimizer`: any direction, its frame, and who guards what."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj
from tests.shampoo_jax.optimizers.test_aliases import (
    GRADIENTS,
    KERNELS,
    OTHERS,
    PARAMS,
    assert_close,
    kernels,
    others,
    run,
)

WEIGHTS = PARAMS["dense"]["kernel"]


def test_any_direction_will_do():
    updates, _ = run(sj.as_optimizer(optax.scale_by_lion(), 0.1, weight_decay=0.2))
    expected, _ = run(optax.scale_by_lion(), KERNELS, WEIGHTS)
    assert_close(kernels(updates), [-0.1 * (u + 0.2 * WEIGHTS) for u in expected], 1e-5)
    adamw, _ = run(optax.nadamw(0.1, 0.9, 0.95, 1e-15, weight_decay=0.2), OTHERS[1:], OTHERS[0])
    assert_close(others(updates), adamw, 1e-5)


@pytest.mark.parametrize("form", ["number", "transformation"])
def test_momentum_may_be_a_number_or_a_transformation(form):
    momentum = 0.5 if form == "number" else optax.trace(0.5)
    updates, _ = run(sj.as_optimizer(optax.scale_by_sign(), 0.1, momentum=momentum))
    trace = 0.0
    for update, g in zip(kernels(updates), KERNELS, strict=True):
        trace = 0.5 * trace + jnp.sign(g)
        assert_close(update, -0.1 * trace)


def test_the_guard_of_the_direction_is_the_optimizers():
    """One guard around all of it: states of matrices and of others are kept together."""
    tx = sj.as_optimizer(sj.scale_by_soap(), 0.1)
    state = tx.init(PARAMS)
    guards = [
        node
        for node in jax.tree.leaves(
            (state, state.inner_state), is_leaf=lambda x: isinstance(x, optax.ApplyIfFiniteState)
        )
        if isinstance(node, optax.ApplyIfFiniteState)
    ]
    assert len(guards) == 1
    # A gradient of a parameter that AdamW has stops the matrices as well.
    bad = {**GRADIENTS[0], "head": GRADIENTS[0]["head"].at[0].set(jnp.nan)}
    updates, after = tx.update(bad, state, PARAMS)
    assert not any(u.any() for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
    with pytest.raises(FloatingPointError, match="1 step was skipped"):
        sj.check_finite(after)


def test_the_placement_is_the_directions_own():
    mesh = jax.make_mesh((4,), ("data",))
    placement = sj.Placement(mesh, "data")
    inherited = sj.as_optimizer(sj.scale_by_shampoo(placement=placement), 0.1, momentum=0.9)
    said = sj.shampoo(0.1, momentum=0.9, placement=placement)
    params = {"w": jnp.ones((8, 4)), "table": jnp.ones((16, 1))}
    with jax.set_mesh(mesh):
        specs = [
            jax.tree.map(lambda x: str(x.sharding), jax.jit(tx.init)(params))
            for tx in (inherited, said)
        ]
    assert specs[0] == specs[1]
    assert any("data" in spec for spec in jax.tree.leaves(specs[0]))


def test_options_of_former_versions_are_answered():
    with pytest.raises(TypeError, match="as_optimizer has no option 'adamw_eps': .*others=optax"):
        sj.as_optimizer(optax.scale_by_lion(), 0.1, adamw_eps=1e-8)  # pyrefly: ignore
