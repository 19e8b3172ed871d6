"""Meta-gradients: every root has a derivative in reverse mode, however it is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shampoo_jax as sj

EXACT, ROUGH = 1e-6, 0.02  # polynomial roots of small factors are wrong by a percent
SOLVERS = {
    "eigh": (sj.TruncatedEigh(), EXACT),
    "shifted": (sj.ShiftedEigh(0.1), EXACT),
    "shifted after": (sj.ShiftedEigh(0.1, before=False), EXACT),
    "newton": (sj.CoupledNewton(0.1, tolerance=1e-12), EXACT),
    "higher order": (sj.HigherOrderNewton(0.0, 0.1, tolerance=1e-12), EXACT),
    "polynomial": (sj.Polynomial(rtol=1e-3), ROUGH),
    "clip": (sj.Polynomial(rtol=1e-3, semantics="clip"), ROUGH),
    "carried": (sj.CarriedBasis(sj.EighBasis(1e-12), 0.1), EXACT),
    "carried QR": (sj.CarriedBasis(sj.QRBasis(60, sort=None), 0.1), EXACT),
}


def gradients(t):
    """Three along a line: factors with a null space, with equal eigenvalues, with neither."""
    g, change = np.random.default_rng(0).normal(size=(2, 3, 4, 4))
    g[0, :, 2:], change[0, :, 2:] = 0, 0
    g[1] = np.diag([1.0, 1.0, 2.0, 3.0])
    return g + t * change


@pytest.mark.parametrize("name", SOLVERS)
def test_an_update_has_the_derivative_of_its_root(name):
    solver, tolerance = SOLVERS[name]
    weights = np.random.default_rng(1).normal(size=(3, 4, 4))
    if name == "carried QR":
        weights[1] = 0  # QR steps do not turn a basis of equal eigenvalues

    @jax.jit
    @jax.value_and_grad
    def loss(t):
        g = gradients(t)
        factor = g @ g.swapaxes(1, 2)
        root, _, _ = solver(factor, 0.25, solver.init(3, 4, factor.dtype))
        return jnp.sum(weights * (root @ g))

    with jax.enable_x64(True):
        h = 1e-5 if tolerance == EXACT else 1e-2
        slope = (loss(h)[0] - loss(-h)[0]) / (2 * h)
        np.testing.assert_allclose(loss(0.0)[1], slope, rtol=tolerance)


@pytest.mark.parametrize("basis", [None, "eigh", "qr", sj.QRBasis(1, 0.1), sj.EighBasis(0.1)])
def test_bases_can_be_differentiated_in_reverse(basis):
    tx = sj.scale_by_soap(basis=basis, every=1)

    def loss(g):
        state = tx.init(g)
        for _ in range(2):
            updates, state = tx.update(g, state)
        return jnp.sum(updates**3)

    assert jax.eval_shape(jax.grad(loss), jnp.ones((3, 2))).shape == (3, 2)


def test_damping_of_eigenvalues_can_be_learned():
    def root(damping):
        solver = sj.ShiftedEigh(damping, before=False)
        return solver(jnp.diag(jnp.array([1.0, 3.0]))[None], 0.5, ())[0][0, 1, 1]

    np.testing.assert_allclose(jax.jit(jax.grad(root))(1.0), -0.5 * 4**-1.5, rtol=1e-5)
