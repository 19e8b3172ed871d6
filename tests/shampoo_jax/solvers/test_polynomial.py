"""Polynomial roots as a solver: names, options, and eigh for factors that they fail on."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shampoo_jax as sj

D = 16


def factors(n, seed=0, d=D):
    """Factors of rank 10 with a spectrum over 4 decades."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d, 10)) * np.geomspace(1, 1e-2, 10)
    return np.float32(x @ x.swapaxes(1, 2))


def stack(exponents, *matrices):
    """Blocks of ones that hold these factors."""
    x = jnp.ones((len(matrices[0]), *(m.shape[-1] for m in matrices)))
    return {"k": dataclasses.replace(sj.Blocks.of(x, exponents), matrices=matrices)}


@pytest.mark.parametrize("name", ["polynomial", "polynomial_clip"])
@pytest.mark.parametrize("option", [dict(rtol=0.0), dict(atol=1e-3), dict(eps=1e-6)])
def test_options_of_another_time_name_the_object_that_has_them(name, option):
    with pytest.raises(TypeError, match=f"no option '{next(iter(option))}'.*solver="):
        sj.scale_by_shampoo(solver=name, **option)


def test_exponents_that_no_polynomial_has_are_refused_early():
    with pytest.raises(ValueError, match="exponent=0.4 is not 1/p .*solver='eigh'"):
        sj.Polynomial().check(0.4)
    for p in (1, 2, 3, 4, 6):
        sj.Polynomial().check(1 / p)


@pytest.mark.parametrize("semantics", ["cut", "clip"])
def test_eigh_solves_what_the_polynomials_cannot(semantics):
    """Negative eigenvalues beyond the cutoff fail the check; the others keep their roots."""
    solver = sj.Polynomial(semantics=semantics)
    solve = jax.jit(lambda a, s: solver(a, 0.25, s))
    good = factors(4)
    bad = good.copy()
    bad[1] = np.diag(np.r_[4.0, np.ones(14), -0.1])
    bad[3, 2, 2] = np.nan
    state = solver.init(4, D, jnp.float32)
    expected, ok, state = solve(good, state)
    assert ok.all() and state.tolist() == [0] * 4
    roots, ok, state = solve(bad, state)
    assert ok.tolist() == [True, True, True, False] and state.tolist() == [0, 1, 0, 0]
    np.testing.assert_array_equal(roots[0], expected[0])
    least = 0.0 if semantics == "cut" else (4 * D * 2.0**-23) ** -0.25
    diagonal = np.diag(np.r_[4**-0.25, np.ones(14), least])
    np.testing.assert_allclose(roots[1], diagonal, rtol=1e-5, atol=1e-4)
    assert solve(bad, state)[2].tolist() == [0, 2, 0, 0]


def solve_as_on_tpu(solver, exponent, factor):
    """Roots, which can be used and which failed, by the way that a TPU's program takes."""
    return solver._or_again(factor, exponent)


@pytest.mark.parametrize("semantics", ["cut", "clip"])
def test_a_tpu_solves_what_the_polynomials_cannot_without_eigh(semantics):
    """Of factors that are no factors, the roots of the positive part, whatever the scale."""
    rng = np.random.default_rng(2)
    q = np.linalg.qr(rng.normal(size=(5, D, D)))[0]
    values = np.stack(
        [
            np.r_[np.geomspace(1, 1e-4, D - 1), -0.1],
            np.r_[np.ones(4), np.zeros(D - 5), -1e-3],  # of low rank
            np.r_[np.ones(D // 2), -np.ones(D // 2)],
            np.r_[1.0, np.full(D - 1, 1e-8)],  # ill-conditioned, a factor
            np.geomspace(1, 1e-2, D),
        ]
    )
    good = np.float32(np.einsum("nij,nj,nkj->nik", q, values, q))
    wild = np.stack([np.full((D, D), np.nan), np.diag(np.r_[np.inf, np.ones(D - 1)])])
    stack = jnp.asarray(np.concatenate([good, np.float32(wild), np.zeros((1, D, D), np.float32)]))
    solver = sj.Polynomial(semantics=semantics)
    solve = jax.jit(lambda a: solve_as_on_tpu(solver, 0.25, a))
    roots, ok, passed = solve(stack)
    assert ok.tolist() == [True] * 5 + [False] * 2 + [True]
    assert passed.tolist() == [False] * 3 + [True] * 2 + [False] * 2 + [True]
    assert np.isfinite(roots).all() and not roots[-1].any()
    least = D * 2.0**-23
    for root, v, w in zip(np.asarray(roots, float), q, values, strict=False):
        floor = np.maximum(w, least) ** -0.25
        exact = floor * (w > least) if semantics == "cut" else floor
        range_of = v * np.sqrt(np.maximum(w, 0))  # where gradients lie
        expected = (v * exact) @ v.T @ range_of
        error = np.linalg.norm(root @ range_of - expected)
        # The last step of "clip" may be 6 % off; near its bound rounding adds to that.
        assert error <= (0.15 if semantics == "clip" else 0.02) * np.linalg.norm(expected)
    scaled = solve(stack * jnp.float32(2.0**40))
    np.testing.assert_allclose(scaled[0] * 2.0**10, roots, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(scaled[1], ok)


def test_no_eigh_is_in_a_tpu_s_program_and_few_products():
    """Its compiler takes minutes for each size of eigh, and seconds for each product."""
    shape = jax.ShapeDtypeStruct((2, 768, 768), jnp.float32)
    count = jax.ShapeDtypeStruct((2,), jnp.int32)
    traced = jax.jit(lambda a, s: sj.Polynomial()(a, 0.25, s)).trace(shape, count)
    programs = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("tpu", "cuda", "cpu")
    }
    tpu = programs["tpu"]
    assert not re.search("custom_call @|Eigh|Qr", tpu) and "stablehlo.while" in tpu
    # Those of the bound, of either precision and of the positive part; thin ones of the checks.
    assert tpu.count("dot_general") <= 4 + 7
    assert "cusolver_syev" in programs["cuda"]
    assert re.search("lapack_ssyev|shampoo_jax_truncated_root", programs["cpu"])


def test_shampoo_goes_the_same_way_as_with_eigh():
    """A stale root meets gradients outside the range of its factor: both must drop them."""
    rng = np.random.default_rng(1)
    params = {"w": jnp.zeros((D, D))}
    grads = [jnp.float32(rng.normal(size=(D, D), scale=1e-3)) for _ in range(3)]
    grads = [g.at[:, 3 + 3 * t :].set(0) for t, g in enumerate(grads)]  # ranks 3, 6, 9
    updates = []
    for solver in ("eigh", "polynomial"):
        tx = sj.scale_by_shampoo(solver=solver, every=2, graft=None)
        state, step = tx.init(params), jax.jit(tx.update)
        for g in grads:
            update, state = step({"w": g}, state, params)
        updates.append(np.asarray(update["w"]))
    a, b = updates
    assert np.vdot(a, b) > 0.998 * np.linalg.norm(a) * np.linalg.norm(b)


def test_sharded_stack_equals_one_device():
    solver = sj.Polynomial()
    stack = factors(8)
    stack[5] = np.diag(np.r_[np.ones(15), -0.1])  # one device falls back, the others do not wait
    mesh = jax.make_mesh((8,), ("owner",))

    def solve(a):
        return solver(a, 0.25, jnp.zeros_like(a[:, 0, 0], jnp.int32))

    stack = jax.device_put(stack, jax.NamedSharding(mesh, P("owner")))
    sharded = jax.jit(jax.shard_map(solve, mesh=mesh, in_specs=P("owner"), out_specs=P("owner")))(
        stack
    )
    for a, b in zip(sharded, jax.jit(solve)(np.asarray(stack)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert sharded[2].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("d", "exponent", "rtol", "accelerator"),
    [
        (256, 0.25, None, sj.Polynomial()),
        (256, 0.5, 1e-3, sj.Polynomial(1e-3)),
        (128, 0.25, None, sj.TruncatedEigh()),  # small
        (256, 0.4, None, sj.TruncatedEigh()),  # no polynomial for it
        (256, 0.25, 1e-12, sj.TruncatedEigh(1e-12)),  # nor for this
        (256, 0.25, jnp.float32(1e-3), None),  # traced by inject_hyperparams
    ],
)
def test_auto_takes_polynomials_where_they_are_faster_and_eigh_elsewhere(
    d, exponent, rtol, accelerator
):
    factor = jax.ShapeDtypeStruct((1, d, d), jnp.float32)
    auto = sj.Auto(rtol)
    accelerator = accelerator or sj.TruncatedEigh(rtol)
    assert auto.choice(factor, exponent, "cpu") == sj.TruncatedEigh(rtol)
    for backend in ("gpu", "tpu"):
        assert auto.choice(factor, exponent, backend) == accelerator


@pytest.mark.parametrize("d", [64, 256, 1024])
def test_the_policy_that_a_solver_tells_is_the_one_in_the_program(d):
    shape = jax.ShapeDtypeStruct((1, d, d), jnp.float32)

    def program(solver, platform):
        traced = jax.jit(lambda a, s: solver(a, 0.25, s)).trace(
            shape, jax.ShapeDtypeStruct((1,), jnp.int32)
        )
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        # Arithmetic alone: by its default the solver takes one matrix at a time on CPU.
        return re.findall(r"dot_general .*?((?:precision|algorithm) = .*?) : ", text)

    for backend, platform in (("cpu", "cpu"), ("gpu", "cuda"), ("tpu", "tpu")):
        policy = sj.Polynomial().policy(d, jnp.float32, backend)
        products = program(sj.Polynomial(precision=policy), platform)
        assert len(products) > 10 and products == program(sj.Polynomial(), platform)


def test_a_policy_of_ones_own_holds_on_every_backend_and_never_rounds_float64():
    own = sj.PrecisionPolicy(jax.lax.Precision.HIGHEST, jax.lax.DotAlgorithmPreset.TF32_TF32_F32)
    full = sj.PrecisionPolicy(jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    for backend in ("cpu", "gpu", "tpu"):
        assert sj.Polynomial(precision=own).policy(256, jnp.float32, backend) == own
        assert sj.Polynomial(precision=own).policy(256, jnp.float64, backend) == full


def test_the_backend_that_is_compiled_for_decides():
    """One state for all of them; on CPU not one product of the polynomials is in the program."""
    tx = sj.invert_roots(sj.Auto())
    blocks = stack((0.25,), jnp.eye(130) + factors(2, d=130))
    state = jax.eval_shape(tx.init, blocks)
    traced = jax.jit(tx.update).trace(blocks, state)
    products = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("dot_general")
        for platform in ("cpu", "cuda")
    }
    assert products["cpu"] == 0 and products["cuda"] > 20
    exact = sj.invert_roots(sj.TruncatedEigh())
    got, after = jax.jit(tx.update)(blocks, tx.init(blocks))
    expected, _ = jax.jit(exact.update)(blocks, exact.init(blocks))
    # Far nearer than the polynomials come, which are 0.7 % off.
    np.testing.assert_allclose(got["k"].matrices[0], expected["k"].matrices[0], rtol=0, atol=1e-4)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, tx.init(blocks))


def test_fallbacks_are_reported_to_the_monitor():
    bad = np.diag(np.r_[4.0, np.ones(14), -0.1]).astype(np.float32)
    a = jnp.asarray(np.concatenate([bad[None], factors(1)]))
    blocks = stack((0.25,), a)
    for solver, expected in ((sj.Polynomial(), [1, 0]), (sj.Auto(), [0, 0])):
        tx = optax.chain(sj.invert_roots(solver), sj.monitor_spectrum())
        _, state = jax.jit(tx.update)(blocks, tx.init(blocks))
        assert sj.read_monitor(state)["k"]["fallbacks"].tolist() == expected
