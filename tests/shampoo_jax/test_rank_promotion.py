"""Nothing relies on arrays of fewer axes being promoted: `jax_numpy_rank_promotion="raise"`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shampoo_jax as sj

PARAMS = {
    "w": np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32),
    "b": np.ones(5, "f"),
}
OPTIMIZERS = {
    "soap": lambda: sj.soap(0.1, every=1, monitor=1, rtol=None),
    "kl_shampoo": lambda: sj.kl_shampoo(0.1, every=1, monitor=1),
    "kl_soap": lambda: sj.kl_soap(0.1, basis="eigh"),
    "one-sided": lambda: sj.one_sided_shampoo(0.1, monitor=1, graft="adam"),
    "polynomial": lambda: sj.shampoo(0.1, solver="polynomial", monitor=1),
    "clip": lambda: sj.shampoo(0.1, solver="polynomial_clip"),
    "damped": lambda: sj.shampoo(0.1, solver="shifted_eigh"),
    "newton": lambda: sj.shampoo(0.1, solver="coupled_newton"),
    "higher order": lambda: sj.shampoo(0.1, solver="higher_order_newton"),
    "carried QR": lambda: sj.shampoo(0.1, solver=sj.CarriedBasis(sj.QRBasis(2, 0.01))),
    "carried eigh": lambda: sj.shampoo(0.1, solver=sj.CarriedBasis(sj.EighBasis(0.1), 1e-6)),
    "KL factors": lambda: sj.shampoo(0.1, statistics="kl", every=2, refresh=sj.Refresh(chunk=1)),
    "damped soap": lambda: sj.scale_by_soap(damping=1e-6),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ranks_are_promoted_nowhere(name):
    params = jax.tree.map(jnp.asarray, PARAMS)
    with jax.numpy_rank_promotion("raise"):
        tx = OPTIMIZERS[name]()
        state = jax.eval_shape(tx.init, params)
        jax.eval_shape(tx.update, params, state, params)
