"""Spectral normalization: singular values, where vectors lie, and gradients that are none.

Recorded updates of the authors' code are replayed in `tests/shampoo_jax/test_golden_transfer.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import shampoo_jax
from shampoo_jax import normalize_spectrum

TX = normalize_spectrum(steps=2, warmup=3, warmup_steps=40)
PARAMS = {
    "embed": jnp.zeros((9, 4)),
    "w": jnp.zeros((4, 6)),
    "layers": {"kernel": jnp.zeros((3, 4, 6))},
    "bias": jnp.zeros(6),
}
UPDATES = {
    "embed": jax.random.normal(jax.random.key(0), (9, 4)),
    "w": jax.random.normal(jax.random.key(1), (4, 6)),
    "layers": {"kernel": jax.random.normal(jax.random.key(2), (3, 4, 6))},
    "bias": jax.random.normal(jax.random.key(3), (6,)),
}
update = jax.jit(TX.update)


def vectors_of(state):
    return state.inner_state.vectors


def test_largest_singular_values_and_mean_squares():
    state = TX.init(PARAMS)
    for _ in range(3):
        updates, state = update(UPDATES, state)
    norm = functools.partial(np.linalg.norm, ord=2)
    assert norm(updates["w"]) == pytest.approx((6 / 4) ** 0.5, rel=1e-4)
    # Without batch axes all but the last are inputs.
    flat = updates["layers"]["kernel"].reshape(12, 6)
    assert norm(flat) == pytest.approx((6 / 12) ** 0.5, rel=1e-4)
    for name in ("embed", "bias"):
        assert np.mean(np.square(updates[name])) == pytest.approx(1.0, rel=1e-5)
        assert vectors_of(state)[name] is None
    cosine = np.vdot(updates["w"], UPDATES["w"]) / np.linalg.norm(updates["w"])
    assert cosine == pytest.approx(float(np.linalg.norm(UPDATES["w"])), rel=1e-5)
    assert vectors_of(state)["w"].shape == (1, 6)


def test_each_layer_of_a_stack_has_its_own():
    axes = shampoo_jax.batch_axes({"layers": 0})
    tx = normalize_spectrum(warmup_steps=60, dimension_numbers=axes)
    updates, state = tx.update(UPDATES, tx.init(PARAMS))
    largest = np.linalg.norm(updates["layers"]["kernel"], ord=2, axis=(1, 2))
    np.testing.assert_allclose(largest, (6 / 4) ** 0.5, rtol=1e-3)
    assert vectors_of(state)["layers"]["kernel"].shape == (3, 6)


def test_outputs_of_flax_kernels():
    query = {"query": {"kernel": jnp.ones((4, 2, 8))}}  # 4 inputs, 16 outputs
    tx = normalize_spectrum()
    updates, _ = tx.update(query, tx.init(query))
    np.testing.assert_allclose(updates["query"]["kernel"], 2 / 8, rtol=1e-5)


def test_axes_in_any_order():
    last_are_inputs = shampoo_jax.DimensionNumbers(((2,), (0,)), batch=(1,))
    tx = normalize_spectrum(dimension_numbers=lambda path, leaf: last_are_inputs)
    turned = {"kernel": UPDATES["layers"]["kernel"].transpose(2, 0, 1)}  # outputs, layers, inputs
    updates, _ = tx.update(turned, tx.init(turned))
    axes = normalize_spectrum(dimension_numbers=shampoo_jax.batch_axes({"kernel": 0}))
    plain = {"kernel": UPDATES["layers"]["kernel"]}
    expected, _ = axes.update(plain, axes.init(plain))
    back = updates["kernel"].transpose(1, 2, 0)
    np.testing.assert_allclose(back, expected["kernel"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-18, 1e6, 1e17])
def test_the_scale_of_updates_does_not_matter(scale):
    state = TX.init(PARAMS)
    plain, _ = update(UPDATES, state)
    scaled, _ = update(jax.tree.map(lambda u: u * scale, UPDATES), state)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(scaled), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


def test_zero_stays_zero_and_keeps_the_vector():
    state = TX.init(PARAMS)
    updates, new = update(jax.tree.map(jnp.zeros_like, UPDATES), state)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    np.testing.assert_array_equal(vectors_of(new)["w"], vectors_of(state)["w"])


def test_a_step_that_is_not_finite_changes_nothing():
    state = TX.init(PARAMS)
    updates, new = update({**UPDATES, "w": UPDATES["w"].at[0, 0].set(jnp.nan)}, state)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, vectors_of(new), vectors_of(state))
    with pytest.raises(FloatingPointError):
        shampoo_jax.check_finite(new)


def test_a_vector_in_the_null_space_is_left():
    one = {**UPDATES, "w": jnp.zeros((4, 6)).at[0, 0].set(3.0)}
    other = {**UPDATES, "w": jnp.zeros((4, 6)).at[1, 1].set(3.0)}
    state = TX.init(PARAMS)
    vectors = {**vectors_of(state), "w": jnp.eye(6)[None, 0]}
    state = state._replace(inner_state=state.inner_state._replace(vectors=vectors))
    _, state = update(one, state)
    np.testing.assert_array_equal(vectors_of(state)["w"][0], jnp.eye(6)[0])
    updates, state = update(other, state)
    assert np.linalg.norm(updates["w"], 2) == pytest.approx((6 / 4) ** 0.5, rel=1e-5)
    np.testing.assert_array_equal(vectors_of(state)["w"][0], jnp.eye(6)[1])


def test_fewer_iterations_after_the_warmup():
    # The ratio of singular values is 2, so an iteration moves the vector by a factor of 4.
    matrix = {"w": jnp.diag(jnp.array([2.0, 1.0]))}
    tx = normalize_spectrum(steps=1, warmup=1, warmup_steps=3)
    state = tx.init(matrix)
    slopes = []
    for _ in range(3):
        v = vectors_of(state)["w"][0]
        slopes.append(float(v[1] / v[0]))
        _, state = tx.update(matrix, state)
    assert slopes[1] / slopes[0] == pytest.approx(4.0**-3, rel=1e-4)
    assert slopes[2] / slopes[1] == pytest.approx(4.0**-1, rel=1e-4)


def test_vmap_and_shapes_alone():
    twice = jax.tree.map(lambda u: jnp.stack([u, 2 * u]), UPDATES)
    state = jax.vmap(TX.init)(twice)
    updates, _ = jax.vmap(TX.update)(twice, state)
    alone, _ = update(UPDATES, TX.init(PARAMS))
    np.testing.assert_allclose(updates["w"][1], alone["w"], rtol=1e-4, atol=1e-6)
    shapes = jax.eval_shape(TX.init, PARAMS)
    found = [(x.shape, x.dtype) for x in jax.tree.leaves(TX.init(PARAMS))]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)] == found


def test_gradients_pass_through():
    def size(scale):
        updates, _ = TX.update(jax.tree.map(lambda u: u + scale, UPDATES), state)
        return sum(jnp.sum(u**3) for u in jax.tree.leaves(updates))

    state = TX.init(PARAMS)
    slope, eps = jax.jit(jax.grad(size))(0.1), 1e-2
    f = jax.jit(size)
    assert float(slope) == pytest.approx(float((f(0.1 + eps) - f(0.1 - eps)) / (2 * eps)), rel=2e-2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_kernels_that_are_split_over_a_mesh(kind):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        laid = NamedSharding(mesh, PartitionSpec("x", "y"))
        params, u = ({"w": jax.device_put(x["w"], laid)} for x in (PARAMS, UPDATES))
        state = jax.jit(TX.init)(params)
        for _ in range(2):
            updates, state = update(u, state, params)
    alone, _ = update({"w": UPDATES["w"]}, TX.init({"w": PARAMS["w"]}))
    np.testing.assert_allclose(updates["w"], alone["w"], rtol=1e-4, atol=1e-6)


def test_narrow_updates_are_normalized_in_float32():
    narrow = {"w": UPDATES["w"].astype(jnp.bfloat16)}
    state = TX.init(narrow)
    updates, _ = update(narrow, state)
    assert updates["w"].dtype == jnp.bfloat16
    assert vectors_of(state)["w"].dtype == jnp.float32


def test_it_chains_behind_a_stock_direction():
    tx = optax.chain(optax.scale_by_adam(), TX, optax.scale(-0.1))
    updates, _ = tx.update(UPDATES, tx.init(PARAMS), PARAMS)
    assert np.linalg.norm(updates["w"], 2) == pytest.approx(0.1 * (6 / 4) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("change", [dict(steps=0), dict(warmup=-1), dict(warmup_steps=0.5)])
def test_numbers_of_steps_that_make_no_sense_are_refused(change):
    name, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        normalize_spectrum(**change)
