"""Roots of a basis that follows its factor by one QR step a refresh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from shampoo_jax.base.options import Checked, is_off
from shampoo_jax.matrix import eigh
from shampoo_jax.matrix.products import identity_like
from shampoo_jax.solvers.bases import QRBasis
from shampoo_jax.solvers.solver import PRODUCT, Cost, Solver

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class IteratedRoot(Checked, Solver):
    """A root of mean square 1 by orthogonal iteration from a random basis, a QR step a refresh.

    `X = factor + damping I`, `Q <- qr(X Q)`, `l_k = max(q_k^T X q_k, floor, rtol * max l)`, root
    `Q diag(l^-e) Q^T` divided by the root mean square of the `l^-e`, `(|l^-e| + eps) / sqrt(d)` if
    there is an eps. The basis is never converged
    exactly: what is left are the largest directions first. Scaling a factor changes nothing but
    through damping and floor. A zero factor keeps its basis and has the identity for a root.

    Attributes:
      damping: Added to the diagonal, absolute.
      floor: Least eigenvalue, absolute.
      eps: Added to the norm of the `l^-e`, absolute.
      rtol: Least eigenvalue as a multiple of the largest; None means `d * eps` of the dtype.
      seed: Of the first bases.

    Source: modded-nanogpt track 3, result #18 (PMuon), with damping, floor and eps 1e-6 on the
    scale of a loss summed over tokens.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> solver = shampoo_jax.IteratedRoot()
      >>> root, ok, basis = solver(4 * jnp.eye(2)[None], 0.5, solver.init(1, 2, jnp.float32))
      >>> root.round(3).tolist()
      [[[1.0, 0.0], [0.0, 1.0]]]
    """

    damping: Any = 0.0
    floor: Any = 0.0
    eps: Any = 0.0
    rtol: Any = None
    seed: int = 0

    def cost(self, d: int, dtype: Any, exponent: float) -> Cost:
        """That of a QR step, and a product."""
        cost = QRBasis(sort=None).cost()
        return cost._replace(flops=cost.flops + PRODUCT)

    def init(self, n: int, d: int, dtype: Any) -> Array:
        """Orthogonal factors of normal matrices `[N, d, d]`, the same for factors of a size."""
        basis = jnp.linalg.qr(jax.random.normal(jax.random.key(self.seed), (d, d), dtype))[0]
        return jnp.broadcast_to(basis, (n, d, d))

    def __call__(self, factor: Array, exponent: float, state: Array) -> tuple[Array, Array, Array]:
        """See `Solver`."""
        x = factor + self.damping * identity_like(factor)
        values, basis, _ = QRBasis(sort=None)(x, state)
        zero = ~x.any((-2, -1))[:, None]
        rtol = x.shape[-1] * jnp.finfo(x.dtype).eps if self.rtol is None else self.rtol
        least = jnp.maximum(self.floor, rtol * values.max(-1, keepdims=True))
        values = jnp.where(zero, 1.0, jnp.maximum(values, least))
        # Relative to the largest eigenvalue, whose power may be outside of the range of float32.
        largest = values.max(-1, keepdims=True)
        powers = (values / largest) ** -exponent
        length = jnp.linalg.norm(powers, axis=-1, keepdims=True)
        if not is_off(self.eps):
            length = length + self.eps * largest**exponent
        powers = powers * (x.shape[-1] ** 0.5 / length)
        root = eigh.reconstruct(powers, basis)
        basis = jnp.where(zero[..., None], state, basis)
        return root.astype(factor.dtype), eigh.finite(root) & eigh.finite(basis), basis
