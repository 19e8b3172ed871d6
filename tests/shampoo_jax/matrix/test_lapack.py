"""`eigh` on every core: against numpy, and the threads that do it."""

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

D = eigh.SMALL + 2


def symmetric(*shape, dtype=np.float32):
    g = np.random.default_rng(0).normal(size=shape)
    return (g @ g.swapaxes(-1, -2)).astype(dtype)


def decomposed(stack, team, one_thread=None):
    """What XLA gets, without XLA."""
    routines = {d: lapack._routine(cython_lapack, name) for d, name in lapack.ROUTINES.items()}
    one_thread = one_thread or lapack.OneThread(ctypes.CDLL(cython_lapack.__file__))
    vectors, values = np.empty_like(stack), np.empty_like(stack[..., 0])
    lapack._decompose(team, one_thread, routines, [stack], [vectors, values])
    return vectors.swapaxes(-1, -2), values


def team_of(cores):
    team = lapack.Team()
    team.cores, team.free = cores, threading.Semaphore(cores)
    return team


decompose = jax.jit(eigh.eigh)


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
        assert lapack.TARGET in decompose.lower(a).as_text()
    eps = float(np.finfo(dtype).eps)
    exact = np.linalg.eigvalsh(a.astype(np.float64))
    tolerance = D * eps * exact.max()
    np.testing.assert_allclose(values, exact, rtol=0, atol=tolerance)
    for found, matrix, w in zip(vectors[:, 0], a[:, 0], values[:, 0], strict=True):
        found = np.asarray(found, np.float64)
        np.testing.assert_allclose(found.T @ found, np.eye(D), rtol=0, atol=D * eps)
        np.testing.assert_allclose((found * w) @ found.T, matrix, rtol=0, atol=tolerance)


def test_only_the_symmetric_part_is_read():
    a = np.random.default_rng(0).integers(0, 9, (D, D)).astype(np.float32)
    assert_equal(decompose(a), decompose((a + a.T) / 2))


def test_nothing_depends_on_the_number_of_threads_or_the_place():
    a = symmetric(1, D + 1, D + 1)  # an odd size: places are aligned differently
    stack = np.repeat(a, 5, axis=0)
    library = ctypes.CDLL(cython_lapack.__file__)
    limit = lapack.OneThread(library)
    before = limit.get()
    try:
        limit.set(2)  # as in a process that sets nothing
        runs = [decomposed(stack, team_of(cores)) for cores in (1, 3, 8)]
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

    def failing(routine, jobz, uplo, *pointers):
        routine(jobz, uplo, *pointers)
        info = ctypes.c_int.from_address(pointers[-1])
        info.value = int(pointers[1] == vectors[1].ctypes.data)

    vectors, values = np.empty_like(stack), np.empty_like(stack[..., 0])
    routine = functools.partial(failing, lapack._routine(cython_lapack, "ssyevd"))
    lapack.Team().run(3, functools.partial(lapack._eigh, routine, stack, vectors, values))
    assert np.isnan(values).tolist() == [[False] * D, [True] * D, [False] * D]
    assert np.isnan(vectors).all((1, 2)).tolist() == [False, True, False]


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


@pytest.mark.parametrize("name", SITUATIONS)
def test_situations(name):
    stack = symmetric(2, D, D)
    situation = SITUATIONS[name]
    one = by_xla if name != "one matrix" else lambda x: jax.lax.linalg.eigh(x)[::-1]
    found, expected = jax.jit(situation(eigh.eigh))(stack), jax.jit(situation(one))(stack)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * np.abs(y).max(initial=0))


def test_donated_and_eager():
    a = symmetric(2, D, D)
    expected = decompose(a)
    assert_equal(jax.jit(eigh.eigh, donate_argnums=0)(jnp.array(a)), expected)
    assert_equal(eigh.eigh(jnp.asarray(a)), expected)


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
    assert lapack.TARGET not in text
    assert "lapack_ssyevd" in text


def test_small_matrices_are_left_to_xla():
    small = np.eye(eigh.SMALL, dtype=np.float32)[None]
    assert lapack.TARGET not in jax.jit(eigh.eigh).lower(small).as_text()


def test_a_team_does_every_place_once_and_as_many_at_a_time_as_there_are_cores():
    team, inside, most, seen = team_of(2), [], [], []
    together = threading.Barrier(2, timeout=60)

    def work(place):
        inside.append(place)
        if place < 2:
            together.wait()  # passes only where two are at work at once
        most.append(len(inside))
        inside.remove(place)
        seen.append(place)

    team.run(7, lambda: work)
    assert sorted(seen) == list(range(7))
    assert max(most) <= 2


def test_many_callers_share_one_team():
    team, seen = team_of(1), []
    callers = [threading.Thread(target=team.run, args=(3, lambda: seen.append)) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert sorted(seen) == sorted([0, 1, 2] * 8)


def test_a_pool_that_takes_nothing_more_leaves_all_to_the_caller():
    team, seen = team_of(4), []
    team.pool.shutdown()
    team.run(3, lambda: seen.append)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("mine", [True, False])
def test_an_error_in_any_thread_is_raised_when_none_is_at_work(mine):
    team, ended = team_of(2), []
    here, together = threading.get_ident(), threading.Barrier(2, timeout=60)

    def work(place):
        together.wait()
        if (threading.get_ident() == here) is mine:
            raise MemoryError
        ended.append(place)

    with pytest.raises(MemoryError):
        team.run(2, lambda: work)
    assert len(ended) == 1


def test_openblas_has_its_threads_back_when_the_last_has_left():
    class Library:
        def scipy_openblas_get_num_threads(self):
            return self.threads

        def scipy_openblas_set_num_threads(self, count):
            self.threads = count

    library = Library()
    library.threads = 7
    limit = lapack.OneThread(library)
    with limit:
        assert library.threads == 1
        with limit:
            assert library.threads == 1
        assert library.threads == 1
    assert library.threads == 7
