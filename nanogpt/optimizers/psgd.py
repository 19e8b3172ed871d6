"""PSGD-Kron for matrices: a small port.

A port, because the packages that have it for JAX import private modules of Optax, which every
release of Optax may move: psgd-jax 0.2.9 and distributed-kron 2.0.0 no longer run with jax 0.10 and
optax 0.2.8, psgdax 0.1.1 does. Left out here: vectors, diagonal factors, schedules of the fit.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.matrix import map_matrices

Array = jax.Array
HIGHEST = jax.lax.Precision.HIGHEST


class PsgdState(NamedTuple):
    """State of `scale_by_psgd`."""

    count: Array  # int32[], steps taken
    mu: Any  # moving averages of the gradients
    left: Any  # upper triangular [in, in] for every matrix; 0 before its first gradient
    right: Any  # upper triangular [out, out]


def scale_by_psgd(
    b1: float = 0.95, rate: float = 1.0, seed: int = 0
) -> optax.GradientTransformation:
    """Rescales updates of matrices by PSGD-Kron's whitening preconditioner.

    With M the bias-corrected average of the gradients (b1), `A = Ql M Qr^T` and, for a matrix V of
    random signs, `B = Ql^(-T) V Qr^(-1)`, every step fits both factors,

      `Ql <- Ql - rate / |A A^T + B B^T| * triu(A A^T - B B^T) Ql`, `Qr` likewise from the right,

    and the update is `Ql^T Ql M Qr^T Qr`. In expectation this whitens: it ends where
    `Ql^T Ql` is proportional to `(M M^T)^(-1/2)`, if M varies on one side only. Updates have
    entries of about 1 to 3, whatever the scale of the gradients.

    Sources: Li 2018 (arXiv:1512.04202), Pooladzandi and Li 2024 (arXiv:2402.11858); rates as in
    modded-nanogpt track 3, result 33. The spectral norm is a lower bound: one product with the
    matrix's longest column. Probes are signs where the papers have normal numbers; the factors
    start at `(mean M^4)^(-1/16)`, so that they suit any scale.

    Args:
        b1: Decay of the momentum.
        rate: Step of the fit.
        seed: Of the probes; step and position in the tree are mixed in.

    Returns:
        Transformation of trees of matrices. A matrix whose gradients were all 0 gets 0.

    Raises:
        ValueError: at init, a parameter that is no matrix.

    Example:
        >>> tx, w = scale_by_psgd(), jnp.eye(2, 3)
        >>> small, large = (tx.update(c * w, tx.init(w))[0] for c in (1.0, 1e3))
        >>> bool(jnp.allclose(small, large, rtol=1e-3, atol=1e-3))
        True
    """

    def init(params: Any) -> PsgdState:
        for x in jax.tree.leaves(params):
            if x.ndim != 2:
                raise ValueError(f"shape={x.shape}: PSGD-Kron takes matrices, route it to AdamW.")
        left, right = (jax.tree.map(lambda p, k=k: _zeros(p, k), params) for k in (0, 1))
        return PsgdState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params), left, right)

    def update(updates: Any, state: PsgdState, params: Any = None) -> tuple[Any, PsgdState]:
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        corrected = optax.tree.bias_correction(mu, b1, count)
        key = jax.random.fold_in(jax.random.key(seed), count)
        leaves, structure = jax.tree.flatten(corrected)
        keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
        each = zip(
            leaves, jax.tree.leaves(state.left), jax.tree.leaves(state.right), keys, strict=True
        )
        done, left, right = (structure.unflatten(part) for part in _by_shape(list(each), rate))
        return done, PsgdState(count, mu, left, right)

    return optax.GradientTransformation(init, update)


def _zeros(parameter: Array, side: int) -> Array:
    dtype = jnp.promote_types(parameter.dtype, jnp.float32)
    return jnp.zeros((parameter.shape[side],) * 2, dtype)


def _by_shape(each: list[tuple[Array, ...]], rate: float) -> list[list[Array]]:
    """Updates, left and right factors; matrices of one shape together, so as to compile once.

    But on CPU one after the other: batched triangular solves of several shapes in one program can
    wait for each other's threads for ever, as the decompositions can that `map_matrices` is for.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (m, *_) in enumerate(each):
        groups.setdefault(m.shape, []).append(i)
    out: list[tuple[Array, ...]] = [()] * len(each)
    for members in groups.values():
        stacked = [jnp.stack(parts) for parts in zip(*(each[i] for i in members), strict=True)]
        new = map_matrices(functools.partial(_one, rate=rate), (len(members),), *stacked)
        for place, i in enumerate(members):
            out[i] = tuple(x[place] for x in new)
    return [list(part) for part in zip(*out, strict=True)]


def _one(m: Array, left: Array, right: Array, key: Array, rate: float) -> tuple[Array, ...]:
    """Update and both factors of one matrix."""
    left, right = _fit(m, *_start(m, left, right), key, rate)
    return _apply(m, left, right), left, right


def _start(m: Array, left: Array, right: Array) -> tuple[Array, Array]:
    """The factors; where they are still 0, multiples of the identity that suit M."""
    largest = jnp.max(jnp.abs(m))
    unit = m / jnp.where(largest > 0, largest, 1.0)
    scale = jnp.where(largest > 0, (jnp.mean(unit**4) * largest**4) ** (-1 / 16), 0.0)
    fresh = left[0, 0] == 0
    return (
        jnp.where(fresh, scale * jnp.eye(len(left), dtype=left.dtype), left),
        jnp.where(fresh, scale * jnp.eye(len(right), dtype=right.dtype), right),
    )


def _fit(m: Array, left: Array, right: Array, key: Array, rate: float) -> tuple[Array, Array]:
    """Both factors one step further, and equal in size; as they were where M is 0."""
    given = jnp.any(m != 0)
    safe_l = jnp.where(given, left, jnp.eye(len(left), dtype=left.dtype))
    safe_r = jnp.where(given, right, jnp.eye(len(right), dtype=right.dtype))
    a = _product(safe_l, m, safe_r.T)
    probe = jax.random.rademacher(key, m.shape, m.dtype)
    solve = jax.scipy.linalg.solve_triangular
    b = solve(safe_r, solve(safe_l, probe, trans=1).T, trans=1).T
    new_l = _step(safe_l, _product(a, a.T), _product(b, b.T), rate)
    new_r = _step(safe_r, _product(a.T, a), _product(b.T, b), rate)
    ratio = jnp.sqrt(jnp.max(jnp.abs(new_r)) / jnp.max(jnp.abs(new_l)))
    return jnp.where(given, new_l * ratio, left), jnp.where(given, new_r / ratio, right)


def _step(q: Array, ours: Array, probe: Array, rate: float) -> Array:
    total = ours + probe
    column = total[:, jnp.argmax(jnp.sum(total**2, axis=0))]
    curvature = jnp.linalg.norm(_product(total, column / jnp.linalg.norm(column)))
    return q - rate / curvature * _product(jnp.triu(ours - probe), q)


def _apply(m: Array, left: Array, right: Array) -> Array:
    """Ql^T Ql M Qr^T Qr."""
    return _product(left.T, left, m, right.T, right)


def _product(first: Array, *others: Array) -> Array:
    for other in others:
        first = jnp.matmul(first, other, precision=HIGHEST)
    return first
