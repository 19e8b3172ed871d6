"""Shampoo-family optimizers as composable Optax transformations.

Everything public is exported here; modules below are free to change.
"""

from shampoo_jax.aliases import shampoo
from shampoo_jax.blocking import blocked
from shampoo_jax.blocks import Blocks, from_gradients, on_gradients, on_updates
from shampoo_jax.directions import scale_by_shampoo
from shampoo_jax.factors import accumulate_factors
from shampoo_jax.filtering import filter_gradient
from shampoo_jax.grafting import graft, scale_by_diagonal
from shampoo_jax.plan import DimensionNumbers
from shampoo_jax.roots import invert_roots, precondition
from shampoo_jax.skipping import accept_missing, skip_nonfinite_blocks
from shampoo_jax.solvers import ShiftedEigh, Solver, TruncatedEigh

__all__ = [
    "Blocks",
    "DimensionNumbers",
    "ShiftedEigh",
    "Solver",
    "TruncatedEigh",
    "accept_missing",
    "accumulate_factors",
    "blocked",
    "filter_gradient",
    "from_gradients",
    "graft",
    "invert_roots",
    "on_gradients",
    "on_updates",
    "precondition",
    "scale_by_diagonal",
    "scale_by_shampoo",
    "shampoo",
    "skip_nonfinite_blocks",
]
