"""Refreshed eigenbases against numpy: which factors are decomposed, and in which order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_jax.solvers.bases import QRBasis


@pytest.mark.parametrize("sort", ["before", None])
def test_only_stale_bases_take_a_qr_step(sort, monkeypatch):
    half = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    stale = half @ half.T
    factors = jnp.stack([jnp.eye(4), jnp.asarray(stale), jnp.diag(jnp.arange(4.0, 0, -1))])
    identities = jnp.broadcast_to(jnp.eye(4), (3, 4, 4))
    calls, plain = [], jnp.linalg.qr

    def counted(a):
        jax.debug.callback(lambda: calls.append(1))
        return plain(a)

    monkeypatch.setattr(jnp.linalg, "qr", counted)
    _, basis, order = jax.jit(QRBasis(tolerance=0.1, sort=sort))(factors, identities)
    jax.effects_barrier()
    assert len(calls) == 1
    columns = np.argsort(-np.diag(stale)) if sort else np.arange(4)
    assert order is None or order[1].tolist() == columns.tolist()
    expected = np.linalg.qr(stale[:, columns])[0]
    signs = np.sign(np.sum(expected * basis[1], 0))
    np.testing.assert_allclose(basis[1] * signs, expected, atol=1e-5)
    np.testing.assert_array_equal(basis[np.array([0, 2])], identities[:2])
