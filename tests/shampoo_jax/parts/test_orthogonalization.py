"""Orthogonalization as a part: what it makes of blocks of any rank, alone and behind directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import shampoo_jax as sj

RNG = np.random.default_rng(0)


def run(tx, grads, steps=1):
    state = tx.init(grads)
    for _ in range(steps):
        updates, state = tx.update(grads, state, grads)
    return updates


def polar(x):
    u, _, vt = np.linalg.svd(np.asarray(x, np.float64).reshape(len(x), -1), full_matrices=False)
    return (u @ vt).reshape(np.shape(x))


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4,), ()])
def test_polar_is_that_of_numpy(shape):
    grads = {"w": jnp.asarray(RNG.normal(size=shape) + 2, jnp.float32)}
    tx = sj.blocked(sj.orthogonalize("polar"), blocking=sj.Blocking(size=None, merge=3))
    expected = polar(grads["w"]) if shape else 1.0
    np.testing.assert_allclose(run(tx, grads)["w"], expected, atol=1e-5)


def test_a_block_of_three_dimensions_is_its_first_one_against_the_rest():
    grads = {"w": jnp.asarray(RNG.normal(size=(3, 2, 4)), jnp.float32)}
    tx = sj.blocked(sj.orthogonalize("polar"), blocking=sj.Blocking(size=None, merge=3))
    out = np.asarray(run(tx, grads)["w"]).reshape(3, -1)
    np.testing.assert_allclose(out @ out.T, np.eye(3), atol=1e-5)


def quintic(x, steps=5):
    a, b, c = 3.4445, -4.775, 2.0315
    x = np.asarray(x, np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x.T @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x


@pytest.mark.parametrize(("dtype", "atol"), [(None, 1e-4), (jnp.bfloat16, 0.1)])
def test_newton_schulz_is_muons_in_float32_and_bfloat16(dtype, atol):
    grads = {"w": jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)}
    out = run(sj.blocked(sj.orthogonalize(dtype=dtype)), grads)["w"]
    error = np.abs(out - quintic(grads["w"])).max()
    assert error < atol and (dtype is None or error > 1e-4)  # or bfloat16 was not used
    assert out.dtype == jnp.float32


@pytest.mark.parametrize("direction", [sj.scale_by_soap, sj.scale_by_shampoo])
def test_it_follows_a_direction_inside_its_blocks(direction):
    grads = {"w": jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)}
    alone = run(direction(every=1), grads, 2)["w"]
    followed = sj.followed_by(direction(every=1), sj.orthogonalize("polar"))
    np.testing.assert_allclose(run(followed, grads, 2)["w"], polar(alone), atol=1e-4)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_it_runs_at_the_owners(axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    place = sj.Placement(mesh, owners="x")
    grads = {"w": jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)}
    here = sj.as_optimizer(sj.followed_by(sj.scale_by_shampoo(), sj.orthogonalize("polar")), 0.1)
    there = sj.scale_by_shampoo(placement=place)
    there = sj.as_optimizer(sj.followed_by(there, sj.orthogonalize("polar")), 0.1, momentum=0.9)
    with jax.set_mesh(mesh):
        placed = jax.device_put(grads, NamedSharding(mesh, P()))
        updates, _ = jax.jit(there.update)(placed, there.init(placed), placed)
    np.testing.assert_allclose(updates["w"], run(here, grads)["w"], atol=1e-4)
    assert sj.explain(grads, there).rows


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sj.orthogonalize("svd"), "method='svd'.*polar"),
        (lambda: sj.orthogonalize(steps=0), "steps=0"),
        (lambda: sj.orthogonalize(coefficients=(1.5, -0.5)), "coefficients=.*three"),
        (lambda: sj.orthogonalize(dtype=jnp.int8), "dtype=int8"),
        (lambda: sj.followed_by(sj.shampoo(0.1), sj.orthogonalize()), "scale_by_"),
    ],
)
def test_what_makes_no_sense_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
