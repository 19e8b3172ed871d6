"""Optimizers on gradients recorded from the benchmark's script, and mistakes that these tell."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanogpt.config.presets import preset
from nanogpt.config.run import ScheduleConfig
from nanogpt.optimizers.build import build_optimizer, in_float32
from scripts.maintenance.parity import golden, optimizers
from scripts.maintenance.parity.measurement import misses


@pytest.mark.trap("A2", "A12", "A18", "A20", "A21")
@pytest.mark.parametrize("recipe", optimizers.ADAMW_RECIPES)
def test_adamw_equals_torch(recipe):
    """Form, eps, decay by the scheduled rate of 1-D too, a rate a group, bfloat16 embedding."""
    assert not misses(optimizers.adamw(recipe))


@pytest.mark.trap("A12")
def test_a12_optax_adam_alone_on_bfloat16_is_another_optimizer():
    """The recorded run tells the difference that `in_float32` makes."""
    z = golden.load("adamw.npz")
    param = jnp.asarray(z["init__embed"], jnp.bfloat16)
    gradients = jnp.asarray(z["grad__embed"], jnp.bfloat16)
    updates = []
    for tx in (in_float32(optax.scale_by_adam(0.8, 0.95)), optax.scale_by_adam(0.8, 0.95)):
        state = tx.init(param)
        for gradient in gradients:
            update, state = tx.update(gradient, state, param)
        updates.append(update)
    assert updates[0].dtype == jnp.float32 and updates[1].dtype == jnp.bfloat16
    assert (updates[0] != updates[1]).mean() > 0.2


@pytest.mark.trap("A5", "M1", "M2")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muon_equals_torch(dtype):
    """Iteration, momentum and the factor of tall and wide kernels."""
    assert not misses(optimizers.muon(dtype))


@pytest.mark.trap("M1")
def test_m1_newton_schulz_alone():
    assert not misses(optimizers.newton_schulz())


@pytest.mark.parametrize(
    ("optimizer", "changes", "least"),
    [
        pytest.param("muon_track3", {"ns_steps": 5}, 1e-4, id="M1-steps"),
        pytest.param("muon_track3", {"ns_coeffs": (3.4445, -4.775, 2.0315)}, 1e-3, id="M1-coeffs"),
        pytest.param("muon_track3", {"ns_dtype": "bfloat16"}, 5e-6, id="M1-bfloat16"),
        pytest.param("muon", {}, 1e-4, id="M2-bias-correction"),
    ],
)
@pytest.mark.trap("M1", "M2")
def test_recorded_muon_tells_the_mistake(optimizer, changes, least):
    settings = {"ns_dtype": "float32"} | changes
    config, params, gradients = optimizers.muon_case(("odd",), **settings)
    config = dataclasses.replace(config, optimizer=optimizer)
    history, _ = optimizers.replay(config, params, gradients)
    assert optimizers.muon_error(history, "f32", "odd") > least


KERNEL = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


def updates_of(config, gradients):
    """Changes of one block matrix, step by step, from `KERNEL`."""

    def named(x):
        return {"blocks": {"0": {"mlp": {"fc": {"kernel": jnp.asarray(x)}}}}}

    history, _ = optimizers.replay(config, named(KERNEL), named(gradients))
    (kernels,) = jax.tree.leaves(history)
    return np.diff(np.concatenate([KERNEL[None], kernels]), axis=0)


def constant_rate(optimizer, **changes):
    """The preset at learning rate 1 of the block matrices, unless changed, in every step."""
    base = preset("track3", optimizer)
    matrices = dataclasses.replace(base.matrices, learning_rate=1.0, **changes)
    return dataclasses.replace(base, matrices=matrices, schedule=ScheduleConfig(5, cooldown=0.0))


@pytest.mark.trap("A18")
def test_a18_eps_is_added_to_the_root_of_the_corrected_moment():
    """On gradients as small as eps, which those that were recorded are not."""
    gradients = np.random.default_rng(2).normal(size=(3, 4, 6)).astype(np.float32) * 1e-8
    config = constant_rate("adamw", weight_decay=0.0, b1=0.9, b2=0.8, eps=1e-8)
    first, second, expected = 0.0, 0.0, []
    for t, g in enumerate(gradients.astype(np.float64), start=1):
        first, second = 0.9 * first + 0.1 * g, 0.8 * second + 0.2 * g * g
        root = np.sqrt(second / (1 - 0.8**t))
        expected.append(-first / (1 - 0.9**t) / (root + 1e-8))
    np.testing.assert_allclose(updates_of(config, gradients), expected, atol=1e-5)


@pytest.mark.trap("S3", "S4", "S6")
def test_s4_until_its_first_refresh_shampoo_is_the_adam_that_sizes_it():
    """Roots every 3 steps are first made at step 3; always the size is Adam's, bias-corrected.

    The gradients are so small that an eps of 1e-8 in the place of 1e-15 would decide the size.
    """
    gradients = np.random.default_rng(1).normal(size=(5, 4, 6)).astype(np.float32) * 1e-10
    adam = constant_rate("adamw", weight_decay=0.0, b1=0.9, b2=0.9, eps=1e-15)
    expected = updates_of(adam, gradients)
    changes = {"weight_decay": 0.0, "every": 3, "cutoff": "relative"}
    actual = updates_of(constant_rate("shampoo", **changes), gradients)
    np.testing.assert_allclose(actual[:2], expected[:2], atol=1e-5)
    assert np.abs(actual[2:] - expected[2:]).max(axis=(1, 2)).min() > 1e-2
    sizes = (np.linalg.norm(x, axis=(1, 2)) for x in (actual, expected))
    np.testing.assert_allclose(*sizes, rtol=1e-5)


@pytest.mark.trap("A20", "S2", "S7")
@pytest.mark.parametrize("optimizer", ["adamw", "muon_track3", "shampoo"])
def test_s2_without_gradient_a_matrix_only_decays(optimizer):
    """By the scheduled rate: p <- p (1 - lr(s) decay); nothing divides by zero."""
    falling = ScheduleConfig(4, cooldown=1.0)  # 1, 3/4, 2/4, 1/4
    config = dataclasses.replace(constant_rate(optimizer, weight_decay=0.25), schedule=falling)
    changes = updates_of(config, np.zeros((2, 4, 6), np.float32))
    first, second = -KERNEL / 4, -KERNEL * (1 - 1 / 4) * 3 / 16
    np.testing.assert_allclose(changes, [first, second], rtol=1e-6)


@pytest.mark.trap("S5")
def test_s5_factors_and_their_use_are_in_full_precision():
    """Products of factors and roots ask for it, whatever the backend's default; all is float32."""
    config = constant_rate("shampoo")
    params = {"blocks": {"0": {"mlp": {"fc": {"kernel": jnp.asarray(KERNEL)}}}}}
    tx = build_optimizer(config, params)
    state = tx.init(params)
    assert {x.dtype.name for x in jax.tree.leaves(state)} <= {"float32", "int32", "uint32", "bool"}
    text = jax.jit(tx.update).lower(params, state, params).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 6  # for each side: factor, root, application
    assert all("[HIGHEST, HIGHEST]" in line and "bf16" not in line for line in products)
