"""Functions on stacks of matrices, arrays to arrays: inverse roots, eigenbases, orthogonalization.

They know no pytrees and no optimizer state, and are public as `shampoo_jax.matrix`.
"""

from shampoo_jax.matrix.batching import map_matrices
from shampoo_jax.matrix.eigh import shifted_root, truncated_root
from shampoo_jax.matrix.newton import (
    RootResult,
    coupled_higher_order,
    coupled_newton,
    rational_root,
)
from shampoo_jax.matrix.orthogonalize import newton_schulz, svd_orthogonalize
from shampoo_jax.matrix.polynomial import polynomial_root
from shampoo_jax.matrix.qr import adaptive_eigh, orthogonal_iteration

# fmt: off
__all__ = [
    "RootResult", "adaptive_eigh", "coupled_higher_order", "coupled_newton", "map_matrices",
    "newton_schulz", "orthogonal_iteration", "polynomial_root", "rational_root", "shifted_root",
    "svd_orthogonalize", "truncated_root",
]
# fmt: on
