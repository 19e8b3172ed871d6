"""Eigenbases refreshed from the previous one: warm-started QR iteration, and eigh where needed."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from shampoo_jax.base.options import WholeNumber, check_entries
from shampoo_jax.matrix.batching import map_matrices, map_selected
from shampoo_jax.matrix.eigh import eigh, power_of_two_scale, without_noise
from shampoo_jax.matrix.products import identity_like, matmul


def off_diagonal_ratio(factor: jax.Array, basis: jax.Array) -> jax.Array:
    """Returns how far `basis` is from an eigenbasis: |B - diag B|_F / |B|_F with B = Q^T A Q.

    Args:
      factor: f[..., n, n], symmetric.
      basis: f[..., n, n], orthogonal columns Q.

    Returns:
      f[...], between 0 (eigenbasis) and 1, independent of the scale of the factor; 0 for a factor
      that is zero.

    Source: the criterion of Eschenhagen et al., arXiv:2506.03595.

    >>> float(off_diagonal_ratio(jnp.ones((2, 2)), jnp.eye(2)))  # doctest: +ELLIPSIS
    0.7071...
    """
    return _ratio(_rotated(factor, basis))


def orthogonal_iteration(
    factor: jax.Array,
    basis: jax.Array,
    iterations: int = 1,
    tolerance: ArrayLike = 0.0,
    rtol: float | None = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Returns eigenvalue estimates and a basis refined from the previous one by QR iterations.

    With B = Q^T A Q, repeats `B = q r`, `B <- r q`, `Q <- Q q` while the off-diagonal ratio of B
    is above `tolerance`, at most `iterations` times; each matrix of a stack stops on its own. One
    iteration equals `Q <- qr(A Q)`. Columns end up sorted by estimate, also when none was done.

    Args:
      factor: f32 or f64[..., n, n], symmetric.
      basis: f[..., n, n], orthogonal, the warm start.
      iterations: Static, the largest number of QR decompositions.
      tolerance: Accepted off-diagonal ratio; scalar or one per matrix.
      rtol: Columns whose estimates are at most this times the largest keep their order; None means
        `n * eps`.

    Returns:
      `(eigenvalues, basis)`: f[..., n] ascending, and f[..., n, n] with columns in that order
      (ties keep theirs) and of arbitrary signs. Dtype of the factor.

    Source: Eschenhagen et al., arXiv:2506.03595; one iteration is SOAP's, arXiv:2409.11321.

    >>> values, basis = orthogonal_iteration(jnp.diag(jnp.array([3.0, 1.0])), jnp.eye(2))
    >>> values.tolist()
    [1.0, 3.0]
    """
    WholeNumber("1 is SOAP's, 0 only sorts", least=0)("iterations", iterations)
    check_entries({"tolerance": tolerance})
    leading, rotated, basis, tolerance = _flat(factor, basis, tolerance)

    def step(rotated: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, r = jnp.linalg.qr(rotated)
        return matmul(r, q), matmul(basis, q)

    def iterate(_, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        stale = ~(_ratio(state[0]) <= tolerance)
        return map_selected(step, stale, state, *state)

    rotated, basis = jax.lax.fori_loop(0, iterations, iterate, (rotated, basis))
    values = _diagonal(rotated)
    ascending = jnp.argsort(without_noise(values, rtol), stable=True)
    values = jnp.take_along_axis(values, ascending, -1)
    basis = columns(basis, ascending)
    return values.reshape(*leading, -1), basis.reshape(*leading, *basis.shape[1:])


def adaptive_eigh(
    factor: jax.Array, basis: jax.Array, tolerance: ArrayLike, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns eigenvalues and eigenvectors; decomposes only where the old basis has gone stale.

    A matrix whose off-diagonal ratio is at most `tolerance` keeps its basis as it is and takes
    diag(Q^T A Q), unsorted, as eigenvalues. `eigh` runs for the others only.

    Args:
      factor: f32 or f64[..., n, n], symmetric.
      basis: f[..., n, n], orthogonal, the previous eigenbasis.
      tolerance: Accepted off-diagonal ratio; scalar or one per matrix. Below 0: always decompose.
      implementation: See `eigh.eigh`.

    Returns:
      `(eigenvalues, basis)`: f[..., n] and f[..., n, n]; ascending where decomposed.

    Source: Eschenhagen et al., arXiv:2506.03595.

    >>> values, _ = adaptive_eigh(jnp.diag(jnp.array([3.0, 1.0])), jnp.eye(2), 0.1)
    >>> values.tolist()
    [3.0, 1.0]
    """
    leading, rotated, basis, tolerance = _flat(factor, basis, tolerance)
    factors = jnp.broadcast_to(factor, leading + factor.shape[-2:]).reshape(basis.shape)
    stale = ~(_ratio(rotated) <= tolerance)
    old = (_diagonal(rotated), basis)
    decompose = functools.partial(eigh, implementation=implementation)
    values, basis = map_selected(decompose, stale, old, factors)
    return values.reshape(*leading, -1), basis.reshape(*leading, *basis.shape[1:])


def completed(basis: jax.Array, keep: jax.Array) -> jax.Array:
    """Returns the basis with the columns that are not kept replaced by others of the same span.

    In a null space rounding alone chooses the basis. Here it follows from the kept columns: these
    are followed by fixed random vectors, which are orthogonalized in their order, so that a small
    change of the kept ones changes the others little.

    Args:
      basis: f[N, n, n], orthogonal.
      keep: bool[N, n], the columns that stay.

    Returns:
      f[N, n, n], orthogonal; signs of the new columns are arbitrary.

    >>> found = completed(jnp.eye(3)[None], jnp.array([[True, False, False]]))
    >>> found[0, :, 0].tolist(), found[0, 0].tolist()
    ([1.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    """
    first = jnp.argsort(~keep, axis=-1, stable=True)
    kept = jnp.take_along_axis(keep, first, -1)[:, None, :]
    ordered = columns(basis, first)
    # Gaussian ones: columns of the identity may lie in the span of the kept ones.
    others = jax.random.normal(jax.random.key(0), basis.shape[1:], basis.dtype)
    given = jnp.where(kept, ordered, jnp.broadcast_to(others, basis.shape))
    q = map_matrices(lambda x: jnp.linalg.qr(x)[0], given.shape[:1], given)
    return columns(jnp.where(kept, ordered, q), jnp.argsort(first, axis=-1))


def columns(matrices: jax.Array, order: jax.Array) -> jax.Array:
    """Returns the columns of each matrix of a stack in this order, `[..., n]`."""
    return jnp.take_along_axis(matrices, order[..., None, :], -1)


def _flat(factor: jax.Array, basis: jax.Array, tolerance: ArrayLike):
    """Leading shape, and with a single leading axis: rotated factors, bases and tolerances."""
    leading = jnp.broadcast_shapes(factor.shape[:-2], basis.shape[:-2], jnp.shape(tolerance))
    basis = jnp.broadcast_to(basis, leading + basis.shape[-2:]).astype(factor.dtype)
    tolerance = jnp.broadcast_to(jnp.asarray(tolerance, factor.dtype), leading)
    rotated = _rotated(factor, basis)
    flat = rotated.reshape(-1, *rotated.shape[-2:])
    return leading, flat, basis.reshape(flat.shape), tolerance.reshape(-1)


def _rotated(factor, basis):
    return matmul(jnp.matrix_transpose(basis), matmul(factor, basis))


def _diagonal(matrix):
    return jnp.diagonal(matrix, axis1=-2, axis2=-1)


def _ratio(matrix):
    """|B - diag B| / |B|, summed off the diagonal: |B|^2 - |diag B|^2 cancels in float32."""
    matrix = matrix / power_of_two_scale(matrix)
    off_diagonal = matrix * (1 - identity_like(matrix))
    norm = jnp.linalg.norm(matrix, axis=(-2, -1))
    return jnp.linalg.norm(off_diagonal, axis=(-2, -1)) / jnp.where(norm == 0, 1, norm)
