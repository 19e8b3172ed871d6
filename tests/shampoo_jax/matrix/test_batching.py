"""Stacks of decompositions: on CPU no LAPACK call may see more than one matrix."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_jax.matrix import qr
from shampoo_jax.matrix.batching import map_matrices, map_selected
from shampoo_jax.matrix.eigh import eigh, truncated_root
from shampoo_jax.matrix.orthogonalize import svd_orthogonalize
from shampoo_jax.matrix.qr import adaptive_eigh, orthogonal_iteration

DECOMPOSITIONS = {
    "qr": (lambda a: orthogonal_iteration(a, a, 2), "geqrf"),
    "svd": (svd_orthogonalize, "gesdd"),
    "adaptive eigh": (lambda a: adaptive_eigh(a, a, 0.1), "syevd"),
    "eigh": (eigh, "syevd"),
    "roots": (lambda a: truncated_root(a, 0.25), "syevd"),
    "adaptive qr": (lambda a: orthogonal_iteration(a, a, 2, 0.1), "geqrf"),
}


@pytest.mark.parametrize("maps", [0, 1, 2])
@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_lapack_sees_one_matrix_at_a_time(name, maps):
    # Two batched calls of different shapes in one program can hang XLA's CPU thread pool.
    function, routine = DECOMPOSITIONS[name]
    for _ in range(maps):
        function = jax.vmap(function)
    stack = jax.ShapeDtypeStruct((3, 2, 5, 5), jnp.float32)
    program = jax.jit(function).lower(stack).compile().as_text()
    calls = [line for line in program.splitlines() if f"lapack_s{routine}" in line]
    assert calls
    for call in calls:
        assert re.search(r"operand_layout_constraints=\{f32\[(1,)?5,5\]", call)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)])
def test_leading_axes(leading):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(*leading, 4, 2)), rng.normal(size=leading)
    total, scaled = map_matrices(
        lambda matrix, scalar: (matrix.sum(), matrix * scalar), leading, jnp.array(a), jnp.array(b)
    )
    np.testing.assert_allclose(total, a.sum((-2, -1)), rtol=1e-4)
    np.testing.assert_allclose(scaled, a * b[..., None, None], rtol=1e-5)


@pytest.mark.parametrize("chosen", [[], [2], [0, 3, 4], range(5)])
def test_matrices_that_are_not_selected_cost_nothing(chosen):
    calls = []

    def double(x, scale):
        jax.debug.callback(lambda: calls.append(1))
        return x * scale

    selected = np.isin(np.arange(5), chosen)
    x = jnp.arange(5.0)[:, None, None] * jnp.ones((5, 2, 2))
    new = jax.jit(lambda s: map_selected(double, s, -x, x, jnp.full(5, 2.0)))(selected)
    jax.effects_barrier()
    np.testing.assert_array_equal(new, np.where(selected[:, None, None], 2 * x, -x))
    assert len(calls) == len(chosen)


@pytest.mark.parametrize("method", ["eigh", "qr"])
def test_an_adaptive_basis_costs_what_is_stale(method, monkeypatch):
    calls = []
    owner = qr if method == "eigh" else qr.jnp.linalg
    plain = getattr(owner, method)

    def counted(a, **options):
        jax.debug.callback(lambda: calls.append(1))
        return plain(a, **options)

    monkeypatch.setattr(owner, method, counted)
    refresh = (
        adaptive_eigh if method == "eigh" else lambda a, q, t: orthogonal_iteration(a, q, 1, t)
    )
    factors = jnp.stack([jnp.eye(3), jnp.ones((3, 3)), jnp.diag(jnp.arange(3.0))])
    jax.jit(refresh)(factors, jnp.broadcast_to(jnp.eye(3), (3, 3, 3)), 0.1)
    jax.effects_barrier()
    assert len(calls) == 1


def test_selected_matrices_have_a_derivative_in_reverse():
    selected, x = jnp.array([True, False, True]), jnp.arange(3.0)
    slope = jax.jit(jax.grad(lambda x: map_selected(jnp.sin, selected, x, x).sum()))(x)
    np.testing.assert_allclose(slope, np.where(selected, np.cos(x), 1.0), rtol=1e-6)
