"""Roots and eigenvalues of factors whose eigenvalues differ by 2.5e7, against numpy in float64.

The factors are products of operands that TF32 holds, with 10 bits, so that no statistics differ
between a device that multiplies these in TF32 and one that does not; from there on an error of
TF32's size, 2^-11 of the largest eigenvalue, would turn what is kept into noise, and change signs.

The bound follows from perturbation theory, with no measured constant. A stable decomposition is
that of `A + E` with `|E| <= d eps max(w)` (LAPACK Users' Guide, section 4.7). In the eigenbasis of
A an entry of its root then moves by at most `|E|` times the divided difference of `w^-e`, which is
0 below the cutoff, between two eigenvalues (Daleckii and Krein); products that form the root add
`d eps` of its largest eigenvalue. Today's errors are less than a tenth of that, TF32's 600 times.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shampoo_jax as sj
from shampoo_jax.matrix.products import contract
from shampoo_jax.solvers.bases import eigenvalue_estimates

D, EPS, RANGE = 8, float(np.finfo(np.float32).eps), 2.5e7
KEPT = 6  # eigenvalues above d eps, each far from it
DAMPING = 1e-3 * RANGE


def tf32(x):
    """Rounded to 10 bits."""
    return jax.lax.reduce_precision(jnp.asarray(x, jnp.float32), 8, 10)


def operand(seed):
    draw = np.random.default_rng(seed)
    values = np.array([1, 0.3, 0.1, 1e-2, 1e-3, 1e-4, 1e-7, 1 / RANGE]) * RANGE
    u, v = (np.linalg.qr(draw.normal(size=(n, n)))[0] for n in (D, 2 * D))
    return np.asarray(tf32((u * np.sqrt(values)) @ v[:D]), float)


OPERANDS = np.stack([operand(seed) for seed in range(4)])
EXACT = OPERANDS @ OPERANDS.swapaxes(1, 2)
VALUES, VECTORS = np.linalg.eigh(EXACT)
FACTORS = contract(jnp.asarray(OPERANDS, jnp.float32), 0)


def test_the_factors_are_what_the_tests_below_are_about():
    ratio = VALUES / VALUES[:, -1:]
    assert (ratio[:, -KEPT] > 50 * D * EPS).all() and (ratio[:, -KEPT - 1] < D * EPS / 5).all()
    assert (VALUES[:, -1] / VALUES[:, 0] > 2e7).all()
    # Sums of 2d products, each rounded once.
    assert np.abs(FACTORS - EXACT).max() <= 2 * D * EPS * VALUES.max()


def excess(roots, exponent, damping=0.0):
    """Errors of roots by entry in the exact eigenbasis, in units of the bound above."""
    found = []
    for root, w, q in zip(np.asarray(roots, float), VALUES, VECTORS, strict=True):
        kept = w + damping > D * EPS * w[-1]
        power = np.where(kept, (w + damping) ** -exponent, 0.0)
        error = q.T @ root @ q - np.diag(power)
        apart = np.abs(w[:, None] - w) + np.eye(D)
        slope = np.abs(power[:, None] - power) / apart + np.diag(exponent * power / (w + damping))
        found.append(np.abs(error) / (D * EPS * (slope * w[-1] + power.max())))
    return np.max(found)


STABLE = {
    "eigh": (sj.TruncatedEigh(), 0.0),
    "carried": (sj.CarriedBasis(), 0.0),
    "auto": (sj.Auto(), 0.0),
    "shifted": (sj.ShiftedEigh(DAMPING), DAMPING),
    "shifted after": (sj.ShiftedEigh(DAMPING, before=False), DAMPING),
}
# Their errors add up over iterations, about ten of them.
ITERATIVE = {
    "newton": (sj.CoupledNewton(DAMPING), DAMPING),
    "higher order": (sj.HigherOrderNewton(0.0, DAMPING), DAMPING),
}


def solved(solver, exponent, factors=FACTORS):
    state = solver.init(len(factors), D, jnp.float32)
    root, ok, _ = solver(factors, exponent, state)
    assert ok.all()
    return root


@pytest.mark.parametrize("exponent", [0.25, 0.5])
@pytest.mark.parametrize("name", [*STABLE, *ITERATIVE])
def test_roots(name, exponent):
    solver, damping = (STABLE | ITERATIVE)[name]
    assert excess(solved(solver, exponent), exponent, damping) < (1 if name in STABLE else 10)


@pytest.mark.parametrize("exponent", [0.25, 0.5])
def test_roots_by_polynomials(exponent):
    """Wrong by 1 % at this size, as they say; of the largest entry, five times that is bound."""
    roots = np.asarray(solved(sj.Polynomial(), exponent), float)
    for root, w, q in zip(roots, VALUES, VECTORS, strict=True):
        power = np.where(w > D * EPS * w[-1], w**-exponent, 0.0)
        assert np.abs(q.T @ root @ q - np.diag(power)).max() < 0.05 * power.max()


BASES = {
    "eigh": sj.EighBasis(),
    "eigh where stale": sj.EighBasis(1e-3),
    **{f"qr, sorted {sort}": sj.QRBasis(sort=sort) for sort in (None, "before", "after")},
}


@pytest.mark.parametrize("name", BASES)
def test_roots_of_a_basis_that_is_carried_on(name):
    """A step from the eigenvectors themselves, in the order of eigh: no step makes them worse."""
    solver, basis = sj.CarriedBasis(BASES[name]), jnp.asarray(VECTORS, jnp.float32)
    for _ in range(3):
        root, ok, basis = solver(FACTORS, 0.25, basis)
        assert ok.all() and excess(root, 0.25) < 1


def eigenvalue_errors(values):
    """Of all eigenvalues, relative to the largest (Weyl), in units of `d eps`."""
    return np.abs(np.sort(values) - VALUES).max() / (D * EPS * VALUES.max())


@pytest.mark.parametrize("name", BASES)
def test_eigenvalues(name):
    """Twice the unit: products of a factor, and of a basis that is rounded itself."""
    vectors = jnp.asarray(VECTORS, jnp.float32)
    known = jnp.ones(vectors.shape[:2], bool)
    values, basis, _ = BASES[name](FACTORS, vectors, known, None)
    assert eigenvalue_errors(values) < 2
    assert eigenvalue_errors(eigenvalue_estimates(FACTORS, basis)) < 2


@pytest.mark.parametrize("exponent", [0.25, 0.5])
def test_tf32_would_be_seen(exponent):
    """Its products, of operands that are rounded once more, are far outside of both bounds."""
    assert excess(solved(sj.TruncatedEigh(), exponent, tf32(FACTORS)), exponent) > 50
    rounded = tf32(FACTORS), tf32(VECTORS)
    assert eigenvalue_errors(eigenvalue_estimates(*rounded)) > 50
    assert (eigenvalue_estimates(*rounded) < 0).any()
