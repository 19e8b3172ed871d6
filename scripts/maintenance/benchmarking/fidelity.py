"""How well a solver's roots keep the direction of Shampoo's update, against float64."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray
Root = Callable[[Array, float], Array]  # float32 factors [N, d, d], exponent -> roots [N, d, d]

DOUBT = 0.05  # an eigenvalue this close to the cutoff may be kept, dropped or something between


def update_cosines(
    gradients: Array, root: Root, *, last: int = 6, sides: int = 2, doubt: float = DOUBT
) -> Array:
    """Cosines between updates by float32 roots and by float64 truncated ones.

    Factors and momentum are float64 averages with decay 0.9, corrected for their start; the
    reference drops eigenvalues at or below `d * eps_float32` of the largest; of one within `doubt`
    of that, relatively, it keeps what the tested root keeps: all, nothing or something between.

    Args:
        gradients: Consecutive gradients of one matrix, [steps, m, n].
        root: Solver under test.
        last: How many of the last steps are compared.
        sides: 2 for `L^(-1/4) M R^(-1/4)`, 1 for exponent 1/2 on the smaller side alone.
        doubt: See above; 0 for the literal cutoff.

    Returns:
        One cosine a step, [last].
    """
    states = list(_averages(gradients.astype(np.float64)))[-last:]
    momenta = np.stack([m for m, _, _ in states])
    exponent = 1 / (2 * sides)
    shorter = int(momenta.shape[1] > momenta.shape[2])
    found = expected = momenta
    for side in (0, 1) if sides == 2 else (shorter,):
        factor = np.stack([state[1 + side] for state in states])
        tested = np.asarray(root(factor.astype(np.float32), exponent), np.float64)
        found = _apply(found, tested, side)
        expected = _apply(expected, truncated_root(factor, exponent, tested, doubt), side)
    return cosine(found, expected)


def _averages(gradients: Array) -> Iterator[tuple[Array, Array, Array]]:
    """Yields (momentum, left factor, right factor) after each step."""
    m = left = right = 0.0
    for t, g in enumerate(gradients, 1):
        m, left, right = (0.9 * old + 0.1 * new for old, new in _pairs(g, m, left, right))
        scale = 1 - 0.9**t
        yield m / scale, left / scale, right / scale


def _pairs(g: Array, m: Any, left: Any, right: Any) -> tuple[tuple[Any, Array], ...]:
    return (m, g), (left, g @ g.T), (right, g.T @ g)


def truncated_root(factor: Array, exponent: float, tested: Array, doubt: float) -> Array:
    """The reference's root, which keeps as much of eigenvalues in doubt as the tested one does."""
    values, vectors = np.linalg.eigh(factor)
    relative = values / (factor.shape[-1] * np.finfo(np.float32).eps * values[:, -1:])
    powers = np.where(values > 0, np.abs(values) ** -exponent, 0.0)
    given = np.einsum("nij,nik,nkj->nj", vectors, tested, vectors)
    share = np.clip(given / np.where(powers > 0, powers, 1.0), 0.0, 1.0)
    keep = np.where(np.abs(relative - 1) < doubt, share, relative > 1)
    return (vectors * (keep * powers)[:, None, :]) @ vectors.swapaxes(1, 2)


def _apply(x: Array, matrix: Array, side: int) -> Array:
    return x @ matrix if side else matrix @ x


def cosine(a: Array, b: Array) -> Array:
    """Cosines between matrices, [N]."""
    norms = np.linalg.norm(a, axis=(1, 2)) * np.linalg.norm(b, axis=(1, 2))
    return np.sum(a * b, axis=(1, 2)) / np.where(norms > 0, norms, 1.0)


def synthetic_gradients(size: int, steps: int = 12, seed: int = 0) -> dict[str, Array]:
    """Gradients `0.3 * mean + A^(1/2) N A^(1/2)` whose noise has covariances of known spectra.

    Args:
        size: Edge of the square matrices.
        steps: Gradients of each.
        seed: Of everything.

    Returns:
        {spectrum: float32 [steps, size, size]}. Spectra: powers of the index i; a spike of eight
        strong directions over a flat rest; and two with half of the eigenvalues exactly 0, the
        others log-spaced from 1 to 1e-12 or all equal.
    """
    random = np.random.default_rng(seed)
    i = np.arange(1, size + 1)
    half = i <= size // 2
    spectra: Mapping[str, Array] = {
        "i^-1": i**-1.0,
        "i^-1.5": i**-1.5,
        "i^-2": i**-2.0,
        "spike": np.where(i <= 8, 1.0, 1e-2),
        "half zero, log-spaced": np.where(half, 10.0 ** (-24 * i / size), 0.0),
        "half zero, flat": half.astype(float),
    }

    def one(spectrum: Array) -> Array:
        sides = []
        for _ in range(2):
            basis, _ = np.linalg.qr(random.normal(size=(size, size)))
            sides.append(basis * np.sqrt(spectrum))
        noise = random.normal(size=(steps + 1, size, size))
        noise[1:] += 0.3 * noise[0]  # the mean, of the same colour
        return (sides[0] @ noise[1:] @ sides[1].T).astype(np.float32)

    return {name: one(spectrum) for name, spectrum in spectra.items()}


def solver_root(solver: Any) -> Root:
    """A solver as a function of arrays, compiled once for each shape and exponent."""

    def roots(factors: jax.Array, exponent: float) -> jax.Array:
        n, d, _ = factors.shape
        return solver(factors, exponent, solver.init(n, d, factors.dtype))[0]

    compiled = jax.jit(roots, static_argnums=1)
    return lambda factors, exponent: np.asarray(compiled(jnp.asarray(factors), exponent))
