"""`eigh` and truncated roots on every core: against numpy, XLA and each other."""

import ctypes
import functools
import importlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import cython_lapack

from shampoo_jax.matrix import eigh, lapack
from shampoo_jax.matrix.threads import OneThread, Team

D = eigh.SMALL + 2
ROUTINES = {dtype: lapack.Routines(dtype) for dtype in lapack.LETTERS}


def symmetric(*shape, dtype=np.float32):
    g = np.random.default_rng(0).normal(size=shape)
    return (g @ g.swapaxes(-1, -2)).astype(dtype)


def low_rank(*shape, dtype=np.float32):
    """A third of full rank."""
    g = np.random.default_rng(1).normal(size=(*shape[:-1], shape[-1] // 3))
    return (g @ g.swapaxes(-1, -2)).astype(dtype)


def team_of(cores):
    team = Team()
    team.cores, team.free = cores, threading.Semaphore(cores)
    return team


def computed(stack, team, routines=ROUTINES):
    """What XLA gets, without XLA."""
    one_thread = OneThread(ctypes.CDLL(cython_lapack.__file__))
    share = functools.partial(lapack._share_out, team, one_thread, routines)
    vectors, values, roots = (
        np.empty_like(stack),
        np.empty_like(stack[..., 0]),
        np.zeros_like(stack),
    )
    options = np.array([[0.25, 1e-4, 0.0]] * len(stack), stack.dtype)
    share(lapack._eigh, [stack], [vectors, values])
    share(lapack._truncated_root, [stack, options], [roots])
    return vectors.swapaxes(-1, -2), values, np.triu(roots)


decompose = jax.jit(eigh.eigh)
ROOT = functools.partial(eigh.truncated_root, exponent=0.25, rtol=1e-4)


def by_xla(stack):
    """What XLA itself makes of it, one matrix at a time."""
    return jax.lax.map(jax.lax.linalg.eigh, stack)[::-1]


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_eigenvalues_and_vectors(dtype):
    with jax.enable_x64(True):
        a = symmetric(3, 1, D, D, dtype=dtype)
        values, vectors = jax.tree.map(np.asarray, decompose(a))
        assert lapack.EIGH in decompose.lower(a).as_text()
    eps = float(np.finfo(dtype).eps)
    exact = np.linalg.eigvalsh(a.astype(np.float64))
    tolerance = D * eps * exact.max()
    np.testing.assert_allclose(values, exact, rtol=0, atol=tolerance)
    for found, matrix, w in zip(vectors[:, 0], a[:, 0], values[:, 0], strict=True):
        found = np.asarray(found, np.float64)
        np.testing.assert_allclose(found.T @ found, np.eye(D), rtol=0, atol=D * eps)
        np.testing.assert_allclose((found * w) @ found.T, matrix, rtol=0, atol=tolerance)


def expected_root(matrix, exponent, rtol, atol):
    values, vectors = np.linalg.eigh(matrix.astype(np.float64))
    kept = values > max(rtol * values[-1], atol)
    return (vectors[:, kept] * values[kept] ** -exponent) @ vectors[:, kept].T


CUTOFFS = {
    "relative": (1e-4, 0.0),
    "absolute": (0.0, 30.0),
    "both": (1e-4, 1e6),
    "none": (1e-4, 0.0),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CUTOFFS)
def test_truncated_roots(name, dtype):
    rtol, atol = CUTOFFS[name]
    with jax.enable_x64(True):
        a = (symmetric if name == "none" else low_rank)(3, 1, D, D, dtype=dtype)
        a[2] = 0
        root = jax.jit(functools.partial(eigh.truncated_root, exponent=0.5, rtol=rtol, atol=atol))
        found, ok = jax.tree.map(np.asarray, root(a))
        assert lapack.ROOT in root.lower(a).as_text()
    assert found.dtype == dtype and ok.all()
    np.testing.assert_array_equal(found, found.swapaxes(-1, -2))
    for one, matrix in zip(found[:, 0], a[:, 0], strict=True):
        exact = expected_root(matrix, 0.5, rtol, atol)
        np.testing.assert_allclose(one, exact, atol=3e4 * np.finfo(dtype).eps * np.abs(exact).max())
    assert not found[2].any()


def test_roots_of_one_matrix_are_the_same_at_any_scale():
    a, one = low_rank(1, D, D), jax.jit(ROOT)
    for scale in (2.0**-100, 2.0**60):
        np.testing.assert_array_equal(one(a * np.float32(scale))[0], one(a)[0] * scale**-0.25)


def test_only_the_symmetric_part_is_read():
    a = np.random.default_rng(0).integers(0, 9, (D, D)).astype(np.float32)
    assert_equal(decompose(a), decompose((a + a.T) / 2))
    assert_equal(ROOT(a), ROOT((a + a.T) / 2))


def test_nothing_depends_on_the_number_of_threads_or_the_place():
    a = symmetric(1, D + 1, D + 1)  # an odd size: places are aligned differently
    stack = np.repeat(a, 5, axis=0)
    library = ctypes.CDLL(cython_lapack.__file__)
    limit = OneThread(library)
    before = limit.get()
    try:
        limit.set(2)  # as in a process that sets nothing
        runs = [computed(stack, team_of(cores)) for cores in (1, 3, 8)]
        assert limit.get() == 2  # given back
    finally:
        limit.set(before)
    for run in runs:
        assert_equal(run, runs[0])
    for array in runs[0]:
        np.testing.assert_array_equal(array, np.broadcast_to(array[:1], array.shape))


def test_arguments_stay_as_they_are():
    a = jnp.asarray(symmetric(2, D, D))
    kept = np.array(a)
    jax.block_until_ready(decompose(a))
    np.testing.assert_array_equal(a, kept)


def test_a_matrix_that_fails_is_nan_alone():
    stack = symmetric(3, D, D)

    class Failing(lapack.Routines):
        def call(self, name, letters, *arrays):
            super().call(name, letters, *arrays)
            if name in ("syevd", "stedc"):
                arrays[-1][0] = next(fails)

    fails = iter([0, 1, 0, 0, 1, 0])  # of both functions
    for array in computed(stack, team_of(1), {"float32": Failing("float32")}):
        upper = np.triu(array) if array.ndim == 3 else array
        assert np.isnan(upper.reshape(3, -1)).any(1).tolist() == [False, True, False]


def test_what_is_not_finite_gives_what_it_gives_by_xla():
    stack = symmetric(3, D, D)
    stack[0, 1, 2], stack[2] = np.nan, np.inf
    found = decompose(stack)
    assert np.isfinite(found[0]).all(1).tolist() == [False, True, False]
    assert_equal(found, jax.jit(by_xla)(stack))


def derivative(decompose):
    def function(x):
        values, vectors = decompose(x)
        return (values**2).sum() + (vectors[..., -1] ** 4).sum()

    return jax.value_and_grad(function)


def in_loops(decompose):
    def body(_, x):
        values, vectors = decompose(x)
        return x + values[..., None] * vectors

    def function(x):
        once, _ = jax.lax.scan(lambda x, _: (body(0, x), None), x, length=2)
        return jax.lax.fori_loop(0, jnp.int32(x[0, 0, 0] > 0) + 1, body, once)

    return function


SITUATIONS = {
    "one matrix": lambda f: lambda x: jax.tree.map(lambda y: y[None], f(x[0])),
    "vmap": lambda f: jax.vmap(lambda x: f(x[None])),
    "vmap of an inner axis": lambda f: lambda x: jax.vmap(f, in_axes=1)(x[None]),
    "derivative": derivative,
    "loops": in_loops,
    "branches": lambda f: lambda x: jax.lax.cond(x[0, 0, 0] > 0, lambda: f(x)[1], lambda: x),
    "empty": lambda f: lambda x: f(x[:0]),
    "mapped over nothing": lambda f: lambda x: jax.vmap(f)(x[:0, None]),
}


def root_and_sum(x):
    root, ok = ROOT(x)
    return jnp.where(ok[..., None], root.sum(-1), 0.0), root


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("kind", ["eigh", "root"])
def test_situations(name, kind, monkeypatch):
    stack = symmetric(2, D, D) if kind == "eigh" else low_rank(2, D, D)
    function = {"eigh": eigh.eigh, "root": root_and_sum}[kind]
    found = jax.jit(SITUATIONS[name](function))(stack)
    monkeypatch.setattr(lapack, "serves", lambda dtype: False)
    expected = jax.jit(SITUATIONS[name](function))(stack)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * np.abs(y).max(initial=0))


def test_donated_and_eager():
    a = symmetric(2, D, D)
    expected = decompose(a)
    assert_equal(jax.jit(eigh.eigh, donate_argnums=0)(jnp.array(a)), expected)
    assert_equal(eigh.eigh(jnp.asarray(a)), expected)
    root = jax.jit(ROOT)(a)
    assert_equal(jax.jit(ROOT, donate_argnums=0)(jnp.array(a)), root)
    assert_equal(ROOT(jnp.asarray(a)), root)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_every_device_of_a_mesh(kind):
    spec, kinds = jax.sharding.PartitionSpec("x"), (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((8,), ("x",), axis_types=kinds)
    stack = symmetric(16, D, D)
    local = jax.shard_map(eigh.eigh, mesh=mesh, in_specs=spec, out_specs=spec)
    with jax.set_mesh(mesh):
        found = jax.jit(local)(jax.device_put(stack, jax.sharding.NamedSharding(mesh, spec)))
    assert all(
        x.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), x.ndim) for x in found
    )
    assert_equal(found, decompose(stack))


def test_where_lapack_is_not_to_be_had(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert not lapack.available.__wrapped__()


def test_without_it_xla_decomposes_and_a_warning_names_the_remedy(monkeypatch):
    monkeypatch.setattr(lapack, "serves", lambda dtype: False)
    monkeypatch.setattr(eigh, "_warned", False)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    with pytest.warns(UserWarning, match="OPENBLAS_NUM_THREADS=1"):
        text = jax.jit(lambda x: eigh.eigh(x)).lower(symmetric(2, D, D)).as_text()
    assert lapack.EIGH not in text
    assert "lapack_ssyevd" in text


def test_small_matrices_are_left_to_xla():
    small = np.eye(eigh.SMALL, dtype=np.float32)[None]
    assert lapack.EIGH not in jax.jit(eigh.eigh).lower(small).as_text()
    assert lapack.ROOT not in jax.jit(ROOT).lower(small).as_text()


def test_other_forms_of_roots_are_left_to_eigh():
    samples = jnp.ones((2, 3, D, D))  # corrects in eigendirections
    for options in ({"implementation": "jacobi"}, {"samples": samples}):
        program = jax.make_jaxpr(functools.partial(ROOT, **options))(low_rank(2, D, D))
        assert lapack.ROOT not in str(program)
