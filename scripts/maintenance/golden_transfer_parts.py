"""What `golden_transfer` builds of public parts, where the authors' code has other ones.

Factors start at a multiple of the identity, roots are renewed at steps 1, 1 + k, ... of factors
with a ridge that may be relative to the largest eigenvalue, a graft is by the norm of the whole
parameter with an eps, bases are by eigh or ten QR steps at first and by one QR step later, spectral
normalization has an eps. Roots are computed by a decomposition in float64, where the recording
iterated to 1e-6.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shampoo_jax as sj
from shampoo_jax.matrix import newton_schulz

Array = jax.Array
Config = dict[str, Any]
Transformation = optax.GradientTransformation


def normalized(is_table: Callable[[str], bool], eps: float, **iterations: Any) -> Transformation:
    """Spectral normalization that adds an absolute eps to what it divides by."""
    inner = sj.normalize_spectrum(embeddings=lambda path, leaf: is_table(path[0].key), **iterations)

    def less(path: Any, new: Array, old: Array) -> Array:
        ratio = 1.0 if is_table(path[0].key) else (old.shape[1] / old.shape[0]) ** 0.5
        length = jnp.linalg.norm(new)
        size = ratio * jnp.linalg.norm(old) / jnp.where(length > 0, length, 1.0)
        return new * (size / (size + eps))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new, state = inner.update(updates, state, params)
        return jax.tree_util.tree_map_with_path(less, new, updates), state

    return optax.GradientTransformation(inner.init, update)


def muon(opt: Config, m: sj.Multipliers) -> Transformation:
    """Nesterov's average, divided by its norm plus eps, orthogonalized."""
    b1, eps = opt["b1"], opt["eps"] * m.eps

    def orthogonal(x: Array) -> Array:
        sized = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + eps)
        return newton_schulz(sized, eps=1.0)

    # b1 M + (1 - b1) G of the new M is this mix of the old one.
    return optax.chain(
        sj.filter_gradient(b1, b1**2, bias_correction=False),
        sj.on_updates(optax.stateless(lambda tree, params: jax.tree.map(orthogonal, tree))),
    )


def shampoo(opt: Config, m: sj.Multipliers, batch: float) -> Transformation:
    """Two-sided or one-sided Shampoo with roots from the first step on."""
    relative, eps = opt["rel_eps"], opt["matrix_eps"]
    start = eps * m.damping * (batch if relative else 1.0)
    ridge = Ridge(eps if relative else eps * m.damping, relative, opt["eigh"])
    return optax.chain(
        sj.filter_gradient(opt["b1"]),
        sj.accumulate_factors(opt["b2"]),
        started_at(start, opt["b2"]),
        held(sj.invert_roots(ridge), opt["freq"]),
        sj.precondition(),
    )


@dataclasses.dataclass(frozen=True)
class Ridge(sj.Solver):
    """Roots of `A + ridge I`, the ridge absolute or relative to the largest eigenvalue."""

    eps: float
    relative: bool
    floored: bool  # eigenvalues are at least the ridge

    def __call__(self, factor: Array, exponent: float, state: Any) -> tuple[Array, Array, Any]:
        """See `Solver`."""
        values, vectors = jnp.linalg.eigh(factor.astype(np.float64))
        ridge = self.eps * (values.max(1, keepdims=True) if self.relative else 1.0)
        values = jnp.maximum(values + ridge, ridge) if self.floored else values + ridge
        root = vectors * values[:, None, :] ** -exponent @ vectors.swapaxes(1, 2)
        return root.astype(factor.dtype), jnp.isfinite(root).all((1, 2)), state


def started_at(start: float, b2: float) -> Transformation:
    """Corrected factors of averages that began at a multiple of the identity."""

    def update(stacks: Any, count: Array, params: Any = None) -> tuple[Any, Any]:
        del params
        count = count + 1
        new = {}
        for key, b in stacks.items():
            left = start * b2**count / (1 - b2**count)
            lift = lambda s: s + (left * jnp.eye(s.shape[-1])).astype(s.dtype)  # noqa: B023, E731
            new[key] = dataclasses.replace(b, matrices=jax.tree.map(lift, b.matrices))
        return new, count

    return optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), update)


def held(roots: Transformation, every: int) -> Transformation:
    """Roots of steps 1, 1 + every, ... alone."""

    def init(params: Any) -> tuple[Array, Any]:
        return jnp.zeros([], jnp.int32), roots.init(params)

    def update(stacks: Any, state: tuple[Array, Any], params: Any = None) -> tuple[Any, Any]:
        count, old = state
        new, fresh = roots.update(stacks, old, params)
        kept = jax.tree.map(functools.partial(jnp.where, count % every == 0), fresh, old)
        new = {k: dataclasses.replace(b, matrices=kept.roots[k]) for k, b in new.items()}
        return new, (count + 1, kept)

    return optax.GradientTransformation(init, update)


def grafted(direction: Transformation, magnitude: Transformation, eps: float) -> Transformation:
    """Updates of one with the norm of another, by whole parameters: `s |a| / (|s| + eps)`."""

    def init(params: Any) -> tuple[Any, Any]:
        return direction.init(params), magnitude.init(params)

    def update(updates: Any, state: tuple[Any, Any], params: Any = None) -> tuple[Any, Any]:
        s, first = direction.update(updates, state[0], params)
        a, second = magnitude.update(updates, state[1], params)
        norm = jnp.linalg.norm
        return jax.tree.map(lambda s, a: s * (norm(a) / (norm(s) + eps)), s, a), (first, second)

    return optax.GradientTransformation(init, update)


def soap(opt: Config, m: sj.Multipliers) -> Transformation:
    """Adam in bases that are renewed before their use, every step at first."""
    second = sj.scale_by_second_moment(opt["b2"], opt["eps"] * m.eps, eps_hat=True)
    before = sj.BasisRefresh(when="before", skip_first=False)
    once = sj.QRBasis(sort="before")
    first = sj.EighBasis(descending=True) if opt["eigh"] else TenSteps(sort="before")
    return optax.chain(
        sj.filter_gradient(opt["b1"]),
        sj.accumulate_factors(opt["b2"], bias_correction=False),
        sj.damp(opt["matrix_eps"] * m.damping),
        after(
            opt["eigh_warmup_steps"],
            sj.eigenbasis(second, basis=first, refresh=before),
            sj.eigenbasis(second, basis=once, every=opt["freq"], refresh=before),
        ),
    )


@dataclasses.dataclass(frozen=True)
class TenSteps(sj.QRBasis):
    """Ten QR steps, each of which sorts columns."""

    def __call__(
        self, factor: Array, basis: Array, kept: Array | None = None, rtol: float | None = 0.0
    ) -> tuple[Array, Array, Array | None]:
        """See `QRBasis`."""
        values, order = jnp.zeros(factor.shape[:2]), jnp.zeros(factor.shape[:2], int)
        order += jnp.arange(factor.shape[1])
        for _ in range(10):
            values, basis, moved = super().__call__(factor, basis, kept, rtol)
            assert moved is not None
            order = jnp.take_along_axis(order, moved, -1)
        return values, basis, order


def after(steps: int, first: Transformation, then: Transformation) -> Transformation:
    """One eigenbasis for some steps, another one that goes on from its state."""

    def update(stacks: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.lax.cond(
            state.count < steps,
            lambda: first.update(stacks, state, params),
            lambda: then.update(stacks, state, params),
        )

    return optax.GradientTransformation(first.init, update)
