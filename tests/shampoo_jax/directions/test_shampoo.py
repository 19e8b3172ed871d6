"""Shampoo's direction as a whole: its invariances, and what its options reach."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj
from shampoo_jax import (
    Blocking,
    DimensionNumbers,
    Refresh,
    TruncatedEigh,
    scale_by_one_sided_shampoo,
    scale_by_second_moment,
    scale_by_shampoo,
)

PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}


def gradients_like(params, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        for _ in range(steps)
    ]


GRADIENTS = gradients_like(PARAMS, 4)


def run(tx, gradients, params=None):
    """Updates of every step, and the last state."""
    params = gradients[0] if params is None else params
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    updates = []
    for g in gradients:
        new, state = update(g, state, params)
        updates.append(new)
    return updates, state


def assert_close(a, b, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * np.abs(y).max())


def scaled(gradients, factor):
    return jax.tree.map(lambda g: g * jnp.asarray(factor, g.dtype), gradients)


SCALE_FREE = {
    "default": {},
    "no graft": {"graft": None},
    "refreshes": {"every": 2, "refresh": Refresh(3)},
    "refreshes, no graft": {"every": 2, "refresh": Refresh(3), "graft": None},
    "positive": {"solver": TruncatedEigh(rtol=0.0)},
    "sums": {"b2": 1.0},
}


@pytest.mark.parametrize("options", SCALE_FREE.values(), ids=SCALE_FREE)
def test_the_scale_of_gradients_does_not_matter(options):
    tx = scale_by_shampoo(**{"b2": 0.9} | options)
    base, _ = run(tx, GRADIENTS)
    # Without a graft the first updates are bare gradients.
    first = 2 if "refresh" in options and options.get("graft", "adam") is None else 0
    # A power of two changes no rounding; else eigenvalues that are noise come out differently,
    # which a cutoff at 0 lets through.
    close = () if "solver" in options else (1e-6, 1e6)
    for factor in (2.0**-20, 2.0**20, *close):
        updates, _ = run(tx, scaled(GRADIENTS, factor))
        assert_close(updates[first:], base[first:], 1e-3 if factor in close else 1e-5)


def test_blocks_are_independent():
    """A matrix cut into blocks is as many parameters, and no block sees another's gradient."""
    rng = np.random.default_rng(1)
    gradients = [{"w": jnp.asarray(rng.normal(size=(6, 7)), jnp.float32)} for _ in range(3)]
    pieces = [
        {"a": g["w"][:4, :4], "b": g["w"][:4, 4:], "c": g["w"][4:, :4], "d": g["w"][4:, 4:]}
        for g in gradients
    ]
    tx = scale_by_shampoo(blocking=Blocking(4))
    whole, _ = run(tx, gradients)
    apart, _ = run(scale_by_shampoo(blocking=Blocking(None)), pieces)
    for w, p in zip(whole, apart, strict=True):
        joined = jnp.block([[p["a"], p["b"]], [p["c"], p["d"]]])
        np.testing.assert_allclose(w["w"], joined, rtol=1e-5, atol=1e-6)
    changed = [{"w": g["w"].at[5, 6].multiply(-3)} for g in gradients]
    other, _ = run(tx, changed)
    same = np.asarray(other[-1]["w"] == whole[-1]["w"])
    assert same[:4].all() and same[4:, :4].all() and not same[4:, 4:].all()


def test_orientation_and_naming_do_not_matter():
    gradients = gradients_like({"w": jnp.ones((3, 2, 4))}, 2)
    rule = DimensionNumbers(((0,), (1, 2)))
    by_rule = Blocking(dimension_numbers=lambda path, leaf: rule)
    named, _ = run(scale_by_shampoo(blocking=by_rule), gradients)
    flat = [{"w": g["w"].reshape(3, 8)} for g in gradients]
    plain, _ = run(scale_by_shampoo(blocking=Blocking(canonical=False)), flat)
    turned, _ = run(scale_by_shampoo(), [{"w": g["w"].T} for g in flat])
    for a, b, c in zip(named, plain, turned, strict=True):
        np.testing.assert_allclose(a["w"].reshape(3, 8), b["w"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(c["w"].T, b["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graft", ["adam", "rmsprop", "adagrad", "sgd", None])
def test_zero_gradients_at_first_give_zero_updates(graft):
    zeros = jax.tree.map(jnp.zeros_like, GRADIENTS[0])
    updates, state = run(scale_by_shampoo(graft=graft), [zeros, zeros, *GRADIENTS[:2]])
    for x in jax.tree.leaves(updates[:2]):
        np.testing.assert_array_equal(x, 0.0)
    for x in jax.tree.leaves(updates[2:]):
        assert np.isfinite(x).all() and np.abs(x).max() > 0
    failures = jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "failures"))
    assert all(
        (f == 0).all() for s in failures if hasattr(s, "failures") for f in s.failures.values()
    )


def test_until_start_the_graft_alone_steps():
    adam = optax.scale_by_adam(b1=0.9, b2=0.8, eps=1e-15)
    tx = scale_by_shampoo(0.9, 0.8, every=2, refresh=Refresh(3))
    updates, expected = run(tx, GRADIENTS)[0], run(adam, GRADIENTS)[0]
    assert_close(updates[:2], expected[:2], 1e-5)
    assert np.abs(np.asarray(updates[2]["w"] - expected[2]["w"])).max() > 1e-2
    # From then on the size of each block is still Adam's.
    for u, e in zip(updates[2:], expected[2:], strict=True):
        for name in u:
            np.testing.assert_allclose(np.linalg.norm(u[name]), np.linalg.norm(e[name]), rtol=1e-5)


def test_half_precision_parameters_get_float32_factors_and_keep_their_dtype():
    half = jax.tree.map(lambda g: g.astype(jnp.bfloat16), GRADIENTS)
    updates, state = run(scale_by_shampoo(), half)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    floats = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {jnp.dtype(jnp.float32)}
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), half)
    assert_close(updates, run(scale_by_shampoo(), wide)[0], 2**-8)


def test_grafts_of_all_kinds():
    """A part sees Blocks; a stock transformation sees raw gradients; both give their norm."""
    part = run(scale_by_shampoo(graft=scale_by_second_moment(0.9, 1e-15)), GRADIENTS)[0]
    assert_close(part, run(scale_by_shampoo(), GRADIENTS)[0])
    stock = run(scale_by_shampoo(graft=optax.scale_by_sign()), GRADIENTS)[0]
    for u in stock:
        for name, x in u.items():
            np.testing.assert_allclose(np.linalg.norm(x), np.sqrt(PARAMS[name].size), rtol=1e-5)


def test_the_smaller_side_is_each_blocks_own_and_the_other_one_is_not_cut():
    shapes = {"tall": (6, 3), "wide": (3, 6), "square": (4, 4), "vector": (3,)}
    gradients = gradients_like({name: jnp.ones(shape) for name, shape in shapes.items()}, 3)
    smaller, state = run(
        scale_by_one_sided_shampoo(side="smaller", blocking=Blocking(4)), gradients
    )
    left, right = (run(scale_by_one_sided_shampoo(side=s), gradients)[0] for s in ("left", "right"))
    for new, of_left, of_right in zip(smaller, left, right, strict=True):
        expected = {**of_right, "wide": of_left["wide"]}
        for name in shapes:
            np.testing.assert_allclose(new[name], expected[name], rtol=1e-3, atol=1e-4)
    factors = {key: [x.shape for x in jax.tree.leaves(f)] for key, f in named(state, "factors")}
    assert factors == {"6x3": [(2, 3, 3)], "4x4": [(1, 4, 4)], "3": [(1, 3, 3)]}


def test_stored_dtypes_and_staggering_reach_the_parts():
    tx = scale_by_shampoo(
        every=2,
        refresh=Refresh(stagger=True, chunk=1),
        mu_dtype=jnp.bfloat16,
        root_dtype=jnp.bfloat16,
    )
    plain, _ = run(scale_by_shampoo(every=2), GRADIENTS)
    updates, state = run(tx, GRADIENTS)
    dtypes = {
        field: {x.dtype.name for _, tree in named(state, field) for x in jax.tree.leaves(tree)}
        for field in ("mu", "roots", "factors")
    }
    assert dtypes == {"mu": {"bfloat16"}, "roots": {"bfloat16"}, "factors": {"float32"}}
    assert_close(updates[:2], plain[:2], 0.02)  # the first refresh is of all blocks, at step 2
    assert np.abs(updates[2]["w"] - plain[2]["w"]).max() > 0.05  # the second block's turn


def named(state, field):
    """(stack, subtree) of every dict in a field of this name."""
    nodes = jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, field))
    return [pair for s in nodes if hasattr(s, field) for pair in getattr(s, field).items()]


def test_one_sided_exponents_ignore_the_other_side():
    exponents = {2: {0: 0.5, 1: 0.0}}
    tx = scale_by_shampoo(exponents=exponents, graft=None, b1=0.0)
    g = GRADIENTS[0]["w"].astype(jnp.float32)
    (update,), state = run(tx, [{"w": g}])
    u, _, vt = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    np.testing.assert_allclose(update["w"], u @ vt, atol=1e-4)  # (G G^T)^(-1/2) G
    matrices = [x.shape for x in jax.tree.leaves(state) if x.ndim == 3 and x.shape[1] == x.shape[2]]
    assert set(matrices) == {(1, 4, 4)}


@pytest.mark.parametrize(("side", "factor"), [("left", 2), ("right", 5)])
def test_one_sided_is_so_for_blocks_of_any_number_of_dimensions(side, factor):
    apart = Blocking(merge=None, dimension_numbers=None)
    tx = scale_by_one_sided_shampoo(0.0, side=side, blocking=apart)
    g = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
    (update,), state = run(tx, [{"w": g}])
    matrices = [x.shape for x in jax.tree.leaves(state) if x.ndim == 3 and x.shape[1] == x.shape[2]]
    assert set(matrices) == {(1, factor, factor)}
    rows = (lambda x: x.reshape(2, 15)) if side == "left" else (lambda x: x.reshape(6, 5).T)
    u, _, vt = np.linalg.svd(rows(np.asarray(g, np.float64)), full_matrices=False)
    np.testing.assert_allclose(rows(update["w"]), u @ vt, atol=1e-4)


@pytest.mark.parametrize("complete", [False, True])
def test_a_statistic_is_a_part(complete):
    grads = {"w": jnp.asarray(np.random.default_rng(3).normal(size=(5, 3)), jnp.float32)}
    factors = optax.chain(sj.accumulate_factors(0.7), sj.damp(0.1))
    make = (lambda **options: sj.shampoo(0.1, **options)) if complete else sj.scale_by_shampoo
    tx = make(b1=0.5, statistics=factors, graft=None)
    parts = (sj.filter_gradient(0.5), factors, sj.invert_roots(), sj.precondition())
    direct = sj.blocked(optax.chain(*parts))
    state, other = tx.init(grads), direct.init(grads)
    for _ in range(2):
        updates, state = tx.update(grads, state, grads)
        expected, other = direct.update(grads, other, grads)
    scale = -0.1 if complete else 1.0
    np.testing.assert_allclose(updates["w"], scale * expected["w"], rtol=1e-6)


@pytest.mark.parametrize("statistics", ["fisher", 3, sj.scale_by_shampoo(), sj.accumulate_factors])
def test_statistics_of_another_kind_are_refused(statistics):
    with pytest.raises(ValueError, match="statistics=.*'gradients'.*'kl'"):
        sj.shampoo(0.1, statistics=statistics)
