"""Inverse-root solvers: what `invert_roots` calls on each stack of factors."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array

# Multiples of d^3 for a d x d matrix. A product, such as Q diag(w^-e) Q^T.
PRODUCT = 2.0
# Golub and Van Loan, Matrix Computations, 4th edition, algorithm 8.3.3: eigenvalues and
# eigenvectors of a symmetric matrix by tridiagonal QR, 4/3 of which is the reduction.
EIGH = 9.0
# Algorithm 5.2.1, Householder QR, and as much again to form Q.
QR = 8 / 3


class Cost(NamedTuple):
    """What a refresh of one factor costs.

    Attributes:
      flops: Multiple of d^3; for Newton's methods, of one iteration.
      method: In words.
      matrices: Temporary d x d matrices at a time, as XLA allocates them; eigh's with workspace.
      fallback: Whether the program also holds an eigh for roots that fail.
    """

    flops: float
    method: str
    matrices: int = 5
    fallback: bool = False


class Solver(Protocol):
    """Computes `factor^(-exponent)` for a stack of factors.

    A call takes factors `[N, d, d]`, a positive float and the state that it returned last time; it
    returns roots `[N, d, d]`, `ok` as `bool[N]`, and the new state. Where `ok` is false the caller
    keeps the previous root and state. A subclass that keeps nothing between refreshes and computes
    every real exponent has to define the call only.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> class DiagonalRoot(shampoo_jax.Solver):
      ...     def __call__(self, factor, exponent, state):
      ...         diagonal = jnp.diagonal(factor, axis1=1, axis2=2)
      ...         inverse = jnp.where(diagonal > 0, diagonal, 1.0) ** -exponent
      ...         root = jnp.where(diagonal > 0, inverse, 0.0)[..., None] * jnp.eye(len(factor[0]))
      ...         return root, jnp.isfinite(root).all((1, 2)), state
      >>> tx = shampoo_jax.scale_by_shampoo(solver=DiagonalRoot(), exponents=None)
      >>> grads = {"w": jnp.array([[3.0, 0.0], [0.0, 0.5]])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["w"].round(2).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """

    def check(self, exponent: float) -> None:
        """Raises ValueError for an exponent that this solver cannot compute; here for none."""
        del exponent

    def init(self, n: int, d: int, dtype: Any) -> Any:
        """What is carried between refreshes, arrays with leading axis n; here nothing."""
        return ()

    def init_root(self, n: int, d: int, dtype: Any, exponent: float) -> Array:
        """Roots `[n, d, d]` until the first refresh; here identities."""
        return identities(n, d, dtype)

    @property
    def swift(self) -> bool:
        """Whether statistics and application may be `swift_gram` and the like; here not.

        They may where noise of 2^-16 of the largest eigenvalue is cut off, as measured.
        """
        return False

    def figures(self, state: Any) -> dict[str, Array]:
        """What a monitor can report of the state, arrays `[n]` by name; here nothing."""
        return {}

    def cost(self, d: int, dtype: Any, exponent: float) -> Cost:
        """Of a root of a factor `[d, d]`, for `explain`; here as if by `eigh`."""
        return Cost(EIGH + PRODUCT, "a method of its own, counted as eigh")

    def __call__(self, factor: Array, exponent: float, state: Any) -> tuple[Array, Array, Any]:
        """Roots, whether each can be used, and the new state."""
        ...


def identities(n: int, d: int, dtype: Any) -> Array:
    """A stack of n identity matrices `[n, d, d]`."""
    return jnp.broadcast_to(jnp.eye(d, dtype=dtype), (n, d, d))
