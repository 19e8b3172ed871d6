"""Inverse roots by symmetric eigendecomposition: truncated (pseudo-inverse) and shifted."""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shampoo_jax.base.options import POSITIVE, UP_TO_ONE, check_choice, check_entries
from shampoo_jax.matrix import lapack
from shampoo_jax.matrix.batching import map_matrices
from shampoo_jax.matrix.derivatives import moved
from shampoo_jax.matrix.noise import debiased, energy_variance
from shampoo_jax.matrix.products import identity_like, matmul

Array = jax.Array
Spectrum = tuple[Array, Array]  # eigenvalues [..., d] and eigenvectors [..., d, d]
Roots = tuple[Array, Array]  # [..., d, d], and whether each can be used

# A root within this of the exact one at an eigenvalue is taken to be that, see `known_root`.
FOLLOWS = 0.1
# Up to this size OpenBLAS decomposes without threads of its own, and a call from Python costs more
# than a second core saves (docs/benchmarks.md).
SMALL = 64
# The names of `jax.lax.linalg.EighImplementation`, which jax 0.8.0 does not have yet.
IMPLEMENTATIONS = ("qr", "jacobi", "qdwh")


def eigh(matrices: Array, implementation: str | None = None) -> Spectrum:
    """Eigendecomposition of a stack of symmetric matrices, `A = Q diag(w) Q^T`.

    On CPU those above `SMALL` are shared out among all cores, see `lapack.eigh`; smaller ones are
    taken one at a time, see `batching.map_matrices`.

    Args:
      matrices: `[..., d, d]`, float32 or float64; only the symmetric part is read.
      implementation: `"qr"` (CPU, GPU), `"jacobi"` (GPU, TPU), `"qdwh"` (TPU), or None for XLA's
        own choice, which depends on d.

    Returns:
      Eigenvalues `[..., d]` in ascending order and eigenvectors `[..., d, d]` in columns.

    Raises:
      ValueError: An implementation that does not exist, or any with jax 0.8.0.
      NotImplementedError: From jax, when the program is lowered for a platform that has not got it.
    """
    check_choice("implementation", implementation, (*IMPLEMENTATIONS, None))
    one = functools.partial(jax.lax.linalg.eigh, **_choosing(implementation))

    def by_xla(stack: Array) -> Any:
        return map_matrices(one, stack.shape[:-2], stack)

    if _on_every_core(matrices, implementation):
        vectors, values = _by_platform(lapack.eigh, by_xla, matrices)
    else:
        vectors, values = by_xla(matrices)
    return values, vectors


def _on_every_core(matrices: Array, implementation: str | None) -> bool:
    """Whether `lapack` serves where a program is lowered for CPU."""
    if matrices.size == 0 or matrices.shape[-1] <= SMALL:
        return False
    if implementation in (None, "qr") and lapack.serves(matrices.dtype):
        return True
    _warn_about_blas_threads()
    return False


def _by_platform(cpu: Callable[..., Any], default: Callable[..., Any], *arguments: Any) -> Any:
    """One of two functions of the same values; derivatives are those of `default`."""
    on_cpu = jax.custom_jvp(cpu)
    on_cpu.defjvp(functools.partial(jax.jvp, default))
    return jax.lax.platform_dependent(*arguments, cpu=on_cpu, default=default)


def _choosing(implementation: str | None) -> dict[str, Any]:
    """The keyword of `jax.lax.linalg.eigh` for an implementation; none for XLA's own choice."""
    if implementation is None:
        return {}
    if not hasattr(jax.lax.linalg, "EighImplementation"):
        raise ValueError(
            f"implementation={implementation!r}: jax {jax.__version__} has no choice; use None, or "
            "jax 0.8.1 or newer."
        )
    return {"implementation": jax.lax.linalg.EighImplementation(implementation)}


_warned = False


def _warn_about_blas_threads() -> None:
    """Warns once where LAPACK's own threads would slow CPU decompositions 10 to 100 times."""
    global _warned
    if not _warned and "OPENBLAS_NUM_THREADS" not in os.environ and jax.default_backend() == "cpu":
        _warned = True
        warnings.warn(
            "eigh on CPU is 10 to 100 times slower with LAPACK's own thread pool: set the "
            "environment variable OPENBLAS_NUM_THREADS=1 before jax is imported.",
            stacklevel=2,
        )


def power_of_two_scale(matrices: Array) -> Array:
    """The power of two at the largest absolute entry of each matrix, `[..., 1, 1]`; 1 for zero.

    Its exponent is within 126 of 0. Dividing by it is exact, keeps every norm away from over- and
    underflow, and makes results independent of the scale of the gradients.
    """
    largest = jnp.max(jnp.abs(matrices), axis=(-2, -1), keepdims=True, initial=0.0)
    # frexp gives largest = m * 2^e with 1/2 <= m < 1; 2^(e-1) is a finite, normal number.
    exponent = jnp.frexp(jnp.where(largest > 0, largest, 1.0))[1] - 1
    # 126 at most: XLA may multiply by the inverse instead, and that of 2^127 is flushed to 0.
    return jnp.ldexp(jnp.ones_like(largest), jnp.clip(exponent, -126, 126))


def finite(matrices: Array) -> Array:
    """Whether each matrix has finite entries only, `bool[...]`."""
    return jnp.isfinite(matrices).all((-2, -1))


def reconstruct(values: Array, vectors: Array) -> Array:
    """`Q diag(values) Q^T`, exactly symmetric, `[..., d, d]`."""
    product = matmul(vectors * values[..., None, :], vectors.swapaxes(-1, -2))
    return (product + product.swapaxes(-1, -2)) / 2


@jax.custom_jvp
def _assembled(matrix: Array, values: Array, vectors: Array, powers: Array, slopes: Array) -> Array:
    """`reconstruct(powers, vectors)` with the derivative of that function of the matrix.

    Values and vectors are the eigendecomposition of the matrix, and have no derivative here; powers
    have that of what they depend on beside them.
    """
    del matrix, values, slopes
    return reconstruct(powers, vectors)


@_assembled.defjvp
def _of_assembled(primals: Any, tangents: Any) -> tuple[Array, Array]:
    _, values, vectors, powers, slopes = primals
    change = moved(values, vectors, powers, slopes, tangents[0])
    return _assembled(*primals), change + reconstruct(tangents[3], vectors)


def slopes_of(powers: Array, exponent: float) -> Array:
    """Derivatives of `w^-exponent` from its values; 0 where those are."""
    return -exponent * powers ** (1 + 1 / exponent)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def known_root(exponent: float, matrix: Array, root: Array) -> Array:
    """A root that has been computed in whatever way, with a derivative.

    It is that of the function which has the root's values at the matrix's eigenvalues, so it fits
    the root however accurate that is. It takes an eigendecomposition, where it is asked for.

    Args:
      exponent: Of the root. Static.
      matrix: Symmetric and finite, `[..., d, d]`.
      root: Of it, truncated or clipped somewhere or not; without a derivative of its own.

    Returns:
      The root.
    """
    del exponent, matrix
    return root


@known_root.defjvp
def _of_known_root(exponent: float, primals: Any, tangents: Any) -> tuple[Array, Array]:
    matrix, root = primals
    scale = power_of_two_scale(matrix)
    values, vectors = eigh(matrix / scale)
    powers = jnp.sum(vectors * matmul(root * scale**exponent, vectors), axis=-2)
    exact = truncated_power(values, exponent, rtol=0.0)
    # Where the root is something else, truncated or clipped, it does not change with its value.
    follows = jnp.abs(powers - exact) <= FOLLOWS * exact
    slopes = jnp.where(follows, slopes_of(powers, exponent), 0.0)
    change = moved(values, vectors, powers, slopes, tangents[0] / scale)
    return root, change * scale**-exponent


def relative_cutoff(rtol: float | None, d: int, dtype: Any) -> float:
    """A cutoff relative to the largest eigenvalue; None means `d * eps`, the numerical rank."""
    return d * float(jnp.finfo(dtype).eps) if rtol is None else rtol


def truncated_power(
    values: Array, exponent: float, *, rtol: Any = None, atol: Any = 0.0, unit: Any = 1.0
) -> Array:
    """`w^-exponent` where an eigenvalue is above the cutoff, 0 elsewhere.

    The cutoff is `max(rtol * max(w), atol)`; `rtol=None` means `d * eps` of the dtype.
    `rtol=0, atol=0` drops only eigenvalues `<= 0`.

    Args:
      values: Eigenvalues, `[..., d]`.
      exponent: Any real number.
      rtol: Cutoff relative to the largest eigenvalue.
      atol: Absolute cutoff.
      unit: Of `values`, but not of `atol`; broadcast against them.

    Returns:
      `[..., d]`, powers of the values as they are given.
    """
    rtol = relative_cutoff(rtol, values.shape[-1], values.dtype)
    largest = jnp.maximum(values.max(-1, keepdims=True), 0.0)
    keep = values > jnp.maximum(rtol * largest, atol / unit)
    return jnp.where(keep, jnp.where(keep, values, 1.0) ** -exponent, 0.0)


def without_noise(values: Array, rtol: float | None) -> Array:
    """Eigenvalues, those of at most `rtol` times the largest of each matrix as 0.

    >>> without_noise(jnp.array([4.0, -1e-9, 1.0]), 0.5).tolist()
    [4.0, 0.0, 0.0]
    """
    rtol = relative_cutoff(rtol, values.shape[-1], values.dtype)
    if isinstance(rtol, float) and rtol == 0:
        return values
    return jnp.where(values > rtol * values.max(-1, keepdims=True), values, 0.0)


def shifted_power(
    values: Array, exponent: float, *, damping: Any, added: bool, unit: Any = 1.0
) -> Array:
    """`w^-exponent` of a spectrum moved to lie at or above damping.

    With `added` (the matrix already holds `damping * I`) the whole spectrum is shifted up where its
    smallest value is below damping; otherwise it is shifted to be non-negative and damping added.

    Args:
      values: Eigenvalues, `[..., d]`.
      exponent: Any real number.
      damping: Smallest eigenvalue afterwards.
      added: Whether the decomposed matrix was `A + damping * I`.
      unit: Of `values`, but not of `damping`; broadcast against them.

    Returns:
      `[..., d]`, powers of the values as they are given.
    """
    damping = damping / unit
    smallest = values.min(-1, keepdims=True)
    if added:
        # Rounding decides whether it is: the damping that counts is the one in the matrix.
        up, down = map(jax.lax.stop_gradient, (damping, smallest))
        values = jnp.where(smallest < damping, values - down + up, values)
    else:
        values = values - jnp.minimum(smallest, 0.0) + damping
    return values**-exponent


def _near_one(factor: Array) -> tuple[Array, Array, Array]:
    """A stack over its `power_of_two_scale`, 0 where not finite; the scale; what is finite."""
    scale, ok = power_of_two_scale(factor), finite(factor)
    return jnp.where(ok[..., None, None], factor / scale, jnp.zeros_like(factor)), scale, ok


def spectral_root(
    factor: Array,
    exponent: float,
    powers: Callable[..., Array],
    decompose: Callable[[Array], Spectrum],
    samples: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Root `Q diag(powers(w)) Q^T` of a stack, computed where its entries are near 1.

    Args:
      factor: Symmetric stack, `[..., d, d]`.
      exponent: Of the root, which says how it scales.
      powers: Function of eigenvalues `[..., d]` and of their `unit`, `[..., 1]`.
      decompose: Eigenvalues and eigenvectors of a finite stack.
      samples: X, `[..., m, d, c]`, of which the factor has `mean_j X_j X_j^T` and noise: powers are
        `debiased` by the variance of their mean. None corrects nothing.

    Returns:
      The roots `[..., d, d]`; per matrix, whether it and its root are finite; the eigenvectors. The
      derivative is that of the root of exact eigenvectors, which have none, and without correction.
    """
    safe, scale, ok = _near_one(factor)
    values, vectors = jax.lax.stop_gradient(decompose(jax.lax.stop_gradient(safe)))
    found = powers(values, unit=scale[..., 0])
    root = _assembled(safe, values, vectors, found, slopes_of(found, exponent))
    if samples is not None:
        variance = energy_variance(samples, vectors, scale)
        corrected = reconstruct(debiased(found, exponent, variance), vectors)
        root = jax.lax.stop_gradient(corrected) + (root - jax.lax.stop_gradient(root))
    root = root * scale**-exponent
    return root, ok & finite(root), vectors


def truncated_root(
    factor: Array,
    exponent: float,
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    implementation: str | None = None,
    samples: Array | None = None,
) -> Roots:
    """Pseudo-inverse root `A^(-exponent)` with eigenvalues at or below the cutoff mapped to 0.

    Source: Moore-Penrose inverse as used by Shampoo on rank-deficient factors (track-3 result 35 of
    modded-nanogpt uses `rtol=0, atol=0`).

    Args:
      factor: Symmetric positive semi-definite stack, `[..., d, d]`.
      exponent: Positive real, 1/4 for two-sided Shampoo on matrices.
      rtol: Cutoff relative to the largest eigenvalue; None means `d * eps` of the dtype.
      atol: Absolute cutoff.
      implementation: See `eigh`.
      samples: See `spectral_root`.

    Returns:
      The roots `[..., d, d]` and, per matrix, whether the result is finite. A zero matrix has root
      zero.
    """
    POSITIVE("exponent", exponent)
    if rtol is not None:
        UP_TO_ONE.but("None means d * eps of the dtype")("rtol", rtol)
    check_entries({"atol": atol})
    rtol = relative_cutoff(rtol, factor.shape[-1], factor.dtype)
    decompose = functools.partial(eigh, implementation=implementation)

    def by_spectrum(factor: Array, rtol: Any, atol: Any) -> Roots:
        powers = functools.partial(truncated_power, exponent=exponent, rtol=rtol, atol=atol)
        return spectral_root(factor, exponent, powers, decompose, samples)[:2]

    def by_lapack(factor: Array, rtol: Any, atol: Any) -> Roots:
        safe, scale, ok = _near_one(factor)
        atol = atol / scale[..., 0, 0]
        root = lapack.truncated_root(safe, exponent, rtol, atol) * scale**-exponent
        return root, ok & finite(root)

    if samples is None and _on_every_core(factor, implementation):
        return _by_platform(by_lapack, by_spectrum, factor, rtol, atol)
    return by_spectrum(factor, rtol, atol)


def shifted_root(
    factor: Array,
    exponent: float,
    *,
    damping: float,
    before: bool = True,
    implementation: str | None = None,
    samples: Array | None = None,
) -> Roots:
    """Root `(A + damping I)^(-exponent)`, the spectrum shifted up where rounding made it smaller.

    Source: the perturbation rule of Meta's distributed_shampoo.

    Args:
      factor: Symmetric positive semi-definite stack, `[..., d, d]`.
      exponent: Positive real.
      damping: Added to every eigenvalue, > 0; absolute, so it depends on the gradients' scale.
      before: Whether damping is added to the matrix before the decomposition or to its eigenvalues.
      implementation: See `eigh`.
      samples: See `spectral_root`.

    Returns:
      The roots `[..., d, d]` and, per matrix, whether the result is finite.
    """
    POSITIVE("exponent", exponent)
    check_entries({"damping": damping, "before": before})
    if before:
        factor = factor + damping * identity_like(factor)
    powers = functools.partial(shifted_power, exponent=exponent, damping=damping, added=before)
    decompose = functools.partial(eigh, implementation=implementation)
    return spectral_root(factor, exponent, powers, decompose, samples)[:2]


def clipped_root(factor: Array, exponent: float, *, rtol: float | None = None) -> Roots:
    """Root `max(A, rtol * largest)^(-exponent)`: eigenvalues below the cutoff are raised to it.

    Args:
      factor: Symmetric stack, `[..., d, d]`, not zero.
      exponent: Positive real.
      rtol: Cutoff relative to the largest eigenvalue; None means `d * eps` of the dtype.

    Returns:
      The roots `[..., d, d]` and, per matrix, whether the result is finite.
    """
    rtol = relative_cutoff(rtol, factor.shape[-1], factor.dtype)

    def powers(values: Array, unit: Array) -> Array:
        return jnp.maximum(values, rtol * values.max(-1, keepdims=True)) ** -exponent

    return spectral_root(factor, exponent, powers, eigh)[:2]
