"""Brake, floors, radius and cautious decay, against numpy and as properties."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj

RNG = np.random.default_rng(0)
W = {"a": RNG.normal(size=(6, 4)), "b": 1e-2 * RNG.normal(size=(3, 5))}
U = {"a": RNG.normal(size=(6, 4)), "b": 1e-4 * RNG.normal(size=(3, 5))}


def applied(tx, updates, params):
    """Updates of one step, in float64."""
    with jax.enable_x64(True):
        updates, params = (jax.tree.map(jnp.asarray, x) for x in (updates, params))
        return jax.tree.map(np.asarray, tx.update(updates, tx.init(params), params)[0])


def close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), found, expected
    )


@pytest.mark.parametrize(("axis", "others"), [(None, (0, 1)), (0, (1,)), (-1, (0,)), ((0, 1), ())])
def test_floors(axis, others):
    def oracle(u, w):
        length, target = (np.sqrt((x**2).sum(others, keepdims=True)) for x in (u, w))
        return u * np.maximum(1, 0.7 * target / length)

    close(applied(sj.floor_update(0.7, axis=axis), U, W), jax.tree.map(oracle, U, W))


def test_steps_that_are_none_are_refused():
    with pytest.raises(ValueError, match="steps=3 is no Optax transformation"):
        sj.cautious_decay(0.1, 0.1, steps=3)


def test_an_axis_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="axis=2 of an update of shape"):
        applied(sj.floor_update(0.7, axis=2), U, W)


@pytest.mark.parametrize("sign", [1, -1])
def test_brake(sign):
    def oracle(u, w):
        k = sign * (u * w).sum() / max((w * w).sum(), 1e-12)
        return sign * u - k * w + (0.5 if k < 0 else 0.8) * k * w

    updates = jax.tree.map(lambda u: sign * u, U)
    close(applied(sj.radial_brake(0.5, 0.8), updates, W), jax.tree.map(oracle, U, W))


def test_the_brake_is_released_near_zero():
    w, u = np.array([1e-8, 0.0]), np.array([-1.0, 2.0])
    close(applied(sj.radial_brake(0.0), u, w), u - u[0] * w[0] / 1e-12 * w)


def test_radius():
    def oracle(d, w):
        length = np.linalg.norm(w)
        rho = length + (d * w).sum() / length
        return (w + d) * rho / np.linalg.norm(w + d) - w

    close(applied(sj.keep_radius(), U, W), jax.tree.map(oracle, U, W))


@pytest.mark.parametrize("step", [[0.0, 3.0], [-9.0, 1.0]])
def test_the_least_radius(step):
    """From 0, and where a step would lead through 0."""
    for w in ([0.0, 0.0], [1.0, 0.0]) if step[0] else ([0.0, 0.0],):
        w, d = np.array(w), np.array(step)
        end = w + applied(sj.keep_radius(0.25), d, w)
        np.testing.assert_allclose(end, 0.25 * (w + d) / np.linalg.norm(w + d), rtol=1e-12)
    zero = np.zeros(2)
    close(applied(sj.keep_radius(), zero, zero), zero)


def test_radii_are_as_exact_in_float32_as_parameters_are():
    """A thousand steps along the tangent: two norms' own rounding would add up to 1e-4."""
    tx, w = sj.keep_radius(), jnp.float32(RNG.normal(size=(64, 64)))

    @jax.jit
    def walk(w):
        def step(w, key):
            d = 1e-2 * jax.random.normal(key, w.shape)
            d -= jnp.vdot(d, w) / jnp.vdot(w, w) * w
            return w + tx.update(d, tx.init(w), w)[0], None

        return jax.lax.scan(step, w, jax.random.split(jax.random.key(0), 1000))[0]

    end = np.linalg.norm(np.float64(walk(w)))
    assert abs(end / np.linalg.norm(np.float64(w)) - 1) < 3e-6


def test_cautious_decay_is_of_what_shrinks_anyway_and_outside_of_the_radius():
    rate = 0.1
    steps = optax.chain(optax.scale_by_learning_rate(rate), sj.keep_radius())
    pinned = applied(steps, U, W)

    def oracle(d, u, w):
        return (w + d) * (1 - rate * 0.3 * (u * w > 0)) - w

    close(applied(sj.cautious_decay(0.3, rate, steps), U, W), jax.tree.map(oracle, pinned, U, W))


def test_cautious_decay_follows_its_schedules():
    rate, decay = optax.linear_schedule(1.0, 0.0, 2), optax.linear_schedule(0.5, 0.25, 1)
    tx, w, u = sj.cautious_decay(decay, rate), jnp.array([8.0]), jnp.array([1.0])
    state, found = tx.init(w), []
    for _ in range(3):
        step, state = tx.update(u, state, w)
        w = w + step
        found.append(float(w[0]))
    assert found == [3.5, 3.0 * (1 - 0.125), 3.0 * (1 - 0.125)]


PARTS = {
    "floor": sj.floor_update(0.5, axis=-1),
    "brake": sj.radial_brake(),
    "radius": sj.keep_radius(),
    "decay": sj.cautious_decay(0.1, 0.1),
}


@pytest.mark.parametrize("name", PARTS)
def test_dtypes_and_missing_and_masked_leaves(name):
    tx = PARTS[name]
    params = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": optax.MaskedNode(), "c": jnp.ones(2)}
    updates = params | {"c": None}
    made, _ = tx.update(updates, tx.init(params), params)
    assert made["a"].dtype == jnp.bfloat16 and made["c"] is None
    with pytest.raises(ValueError, match="params=None"):
        tx.update(updates, tx.init(params))
    with pytest.raises(ValueError, match="shape"):
        tx.update({"a": jnp.ones((3, 2))}, tx.init(params), {"a": jnp.ones((2, 3))})


@pytest.mark.parametrize("name", ["floor", "brake", "radius"])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_of_the_parameters_do_not_matter(name, scale):
    """Of updates and parameters together; the floors are below these norms."""
    tx = {
        "floor": PARTS["floor"],
        "brake": sj.radial_brake(floor=0.0),
        "radius": sj.keep_radius(0.0),
    }
    big = jax.tree.map(lambda x: scale * x, (U, W))
    expected = jax.tree.map(lambda x: scale * x, applied(tx[name], U, W))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), applied(tx[name], *big), expected
    )
