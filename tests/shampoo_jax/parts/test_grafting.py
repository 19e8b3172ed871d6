"""Magnitudes, and giving one part's norm to another part's direction."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shampoo_jax.blocks.blocking import Blocking
from shampoo_jax.blocks.blocks import Blocks, stateless
from shampoo_jax.parts.grafting import graft, make_magnitude, scale_by_second_moment
from shampoo_jax.parts.lift import from_gradients, on_updates
from shampoo_jax.stacks.blocked import blocked

RNG = np.random.default_rng(0)
GRADIENT = RNG.normal(size=(3, 2, 4)).astype(np.float32)
UPDATE = RNG.normal(size=(3, 2, 4)).astype(np.float32)


def blocks_of(gradient, update=None):
    blocks = Blocks.of(jnp.asarray(gradient))
    update = blocks.update if update is None else jnp.asarray(update)
    return {"k": dataclasses.replace(blocks, update=update)}


def step(tx, *blocks):
    """The last update of a few steps, and the state."""
    state, update = tx.init(blocks[0]), jax.jit(tx.update)
    for b in blocks:
        new, state = update(b, state)
    return new["k"], state


def norm(x):
    return np.sqrt((np.asarray(x, np.float64) ** 2).sum((1, 2)))


def test_each_block_has_the_direction_of_one_and_the_norm_of_the_other():
    tx = graft(on_updates(optax.scale(3.0)), on_updates(optax.scale_by_sign()))
    new, _ = step(tx, blocks_of(GRADIENT, UPDATE))
    np.testing.assert_allclose(norm(new.update), 3 * norm(UPDATE), rtol=1e-6)
    expected = np.sign(UPDATE) * (3 * norm(UPDATE) / np.sqrt(8))[:, None, None]
    np.testing.assert_allclose(new.update, expected, rtol=1e-6)
    np.testing.assert_allclose(new.figures["graft_ratio"], 3 * norm(UPDATE) / np.sqrt(8), rtol=1e-6)


def test_norms_are_per_block_not_per_parameter():
    tx = blocked(
        graft(on_updates(optax.identity()), from_gradients(optax.scale_by_sign())),
        blocking=Blocking(size=2),
    )
    params = {"w": jnp.asarray([[1.0, 1.0, 5.0], [1.0, 1.0, 5.0]])}
    updates, _ = tx.update(params, tx.init(params))
    np.testing.assert_allclose(updates["w"], params["w"], rtol=1e-6)


def test_zero_direction_or_magnitude_gives_zero():
    zero = on_updates(optax.scale(0.0))
    for tx in (
        graft(on_updates(optax.identity()), zero),
        graft(zero, on_updates(optax.identity())),
    ):
        new, _ = step(tx, blocks_of(GRADIENT))
        np.testing.assert_array_equal(new.update, 0.0)


@pytest.mark.trap("S2")
@pytest.mark.parametrize(
    "magnitude",
    [
        *("adam", "rmsprop", "adagrad", "sgd"),
        scale_by_second_moment(0.9, 0.0),
        scale_by_second_moment(0.9, 0.0, bias_correction=False),
        scale_by_second_moment(1.0, 0.0),
    ],
)
def test_zero_gradients_give_zero_and_no_nan(magnitude):
    tx = graft(make_magnitude(magnitude, 0.9), on_updates(optax.identity()))
    zeros = blocks_of(np.zeros_like(GRADIENT))
    new, _ = step(tx, zeros, zeros)
    np.testing.assert_array_equal(new.update, 0.0)
    new, _ = step(tx, zeros, zeros, blocks_of(GRADIENT))
    assert np.isfinite(new.update).all()
    assert (norm(new.update) > 0).all()


@pytest.mark.parametrize("eps", [0.0, 1e-15])
def test_an_entry_without_any_gradient_so_far_stays_zero(eps):
    gradient = GRADIENT.copy()
    gradient[0, 1, 2] = 0
    tx = graft(scale_by_second_moment(0.9, eps), on_updates(optax.identity()))
    new, _ = step(tx, blocks_of(gradient), blocks_of(gradient))
    assert new.update[0, 1, 2] == 0
    np.testing.assert_allclose(norm(new.update), np.sqrt([7, 8, 8]), rtol=1e-5)


def test_until_the_direction_is_ready_the_magnitude_is_the_update():
    def opposite(ready):
        return stateless(lambda b: dataclasses.replace(b, update=-b.update, ready=ready))

    for ready, expected in ((False, 2 * UPDATE), (True, -2 * UPDATE)):
        tx = graft(on_updates(optax.scale(2.0)), opposite(jnp.asarray(ready)))
        new, _ = step(tx, blocks_of(GRADIENT, UPDATE))
        np.testing.assert_allclose(new.update, expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_norms_of_extreme_directions(scale):
    tx = graft(from_gradients(optax.scale(1.0)), on_updates(optax.identity()))
    direction = GRADIENT * np.float32(scale)
    new, _ = step(tx, blocks_of(GRADIENT, direction))
    np.testing.assert_allclose(new.update, GRADIENT, rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "sign", "adam", "lion", "adagrad", "chain"])
def test_any_stock_transformation_sizes_the_update_from_raw_gradients(name):
    stock = {
        "sgd": optax.trace(0.9),
        "sign": optax.scale_by_sign(),
        "adam": optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-6),
        "lion": optax.scale_by_lion(),
        "adagrad": optax.scale_by_rss(),
        "chain": optax.chain(optax.clip(0.5), optax.scale_by_adam()),
    }[name]
    tx = graft(make_magnitude(stock, 0.9), on_updates(optax.identity()))
    second = RNG.normal(size=GRADIENT.shape).astype(np.float32)
    new, _ = step(tx, blocks_of(GRADIENT, UPDATE), blocks_of(second, UPDATE))
    state = stock.init(GRADIENT)
    _, state = stock.update(jnp.asarray(GRADIENT), state)
    alone, _ = stock.update(jnp.asarray(second), state)
    np.testing.assert_allclose(norm(new.update), norm(alone), rtol=1e-5)
    np.testing.assert_allclose(
        new.update, UPDATE * (norm(alone) / norm(UPDATE))[:, None, None], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("b2", "options"),
    [
        (0.9, {}),  # Adam
        (0.9, {"bias_correction": False}),  # RMSProp
        (1.0, {}),  # AdaGrad
        (0.9, {"weighted": False}),
        (0.9, {"exponent": 0.4}),
        (0.9, {"exponent": lambda ndim: 1 / (2 * ndim)}),
        (0.9, {"eps_hat": True}),
        (0.9, {"eps_hat": True, "exponent": 0.4}),
        (0.9, {"eps_hat": True, "bias_correction": False}),
        (1.0, {"eps_hat": True}),
    ],
)
def test_second_moment(b2, options):
    eps = 1e-3
    second = RNG.normal(size=GRADIENT.shape).astype(np.float32)
    tx = scale_by_second_moment(b2, eps, **options)
    new, state = step(tx, blocks_of(GRADIENT, UPDATE), blocks_of(second, UPDATE))
    weighted = options.get("weighted", True) and b2 < 1
    weight = 1 - b2 if weighted else 1.0
    nu = b2 * weight * GRADIENT.astype(np.float64) ** 2 + weight * second.astype(np.float64) ** 2
    corrected = weighted and options.get("bias_correction", True)
    exponent = options.get("exponent", 0.5)
    exponent = exponent(2) if callable(exponent) else exponent
    correction = (1 - b2**2) ** exponent if corrected else 1.0
    hat = options.get("eps_hat", False)
    root = (nu**exponent + (eps if hat else eps * correction)) / correction
    np.testing.assert_allclose(new.update, UPDATE / root, rtol=2e-5)
    np.testing.assert_allclose(state.nu["k"], nu, rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(0.1),
        optax.sgd(0.1),
        optax.adamw(0.1),
        optax.sgd(optax.linear_schedule(0.0, 0.1, 9)),  # which does not move at first
        optax.MultiSteps(optax.sgd(0.1), 4),
        optax.sgd(0.0),
    ],
)
def test_a_complete_optimizer_is_no_graft(optimizer):
    with pytest.raises(ValueError, match="graft=.* is a complete optimizer"):
        make_magnitude(optimizer, 0.9)


def test_a_graft_is_looked_at_under_jit_as_well():
    def update(gradient):
        tx = blocked(make_magnitude(optax.scale_by_adam(), 0.9))
        return tx.update({"w": gradient}, tx.init({"w": gradient}))[0]

    assert jax.jit(update)(jnp.ones((2, 2)))["w"].shape == (2, 2)


def test_second_moments_of_microbatches_corrected_for_their_noise():
    x, b2, eps = np.random.default_rng(3).normal(size=(2, 4, 3)), 0.9, 1e-3
    part = scale_by_second_moment(b2, eps, microbatches="half", debias="all")
    state, nu = part.init({"k": Blocks.of(jnp.zeros((1, 3)))}), np.zeros(3)
    for t, micro in enumerate(x, start=1):
        given = {"half": jnp.asarray(micro[None, 2:], "f4"), "all": jnp.asarray(micro[None], "f4")}
        blocks = Blocks(jnp.zeros((1, 3)), jnp.ones((1, 3)), further=given)
        new, state = part.update({"k": blocks}, state)
        each = np.sqrt((b2 * nu + (1 - b2) * micro**2) / (1 - b2**t))
        nu = b2 * nu + (1 - b2) * (micro[2:] ** 2).mean(0)
        p = np.sqrt(nu / (1 - b2**t)) + eps
        expected = np.maximum(1 / p - each.var(0, ddof=1) / 4 / p**3, 0)
        np.testing.assert_allclose(new["k"].update[0], expected, rtol=1e-4, atol=1e-5)
    assert (expected > 0).any() and (expected < 1 / p).all()
