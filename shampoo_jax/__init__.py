"""Shampoo-family optimizers as composable Optax transformations.

Everything public is exported here; the rooms below are free to change.
"""

from shampoo_jax.base.hyperparameters import inject_hyperparams
from shampoo_jax.blocks.blocking import Blocking
from shampoo_jax.blocks.blocks import Blocks, MeanSquares
from shampoo_jax.blocks.dimension_numbers import (
    DimensionNumbers,
    batch_axes,
    default_dimension_numbers,
)
from shampoo_jax.blocks.exponents import resolve_exponents
from shampoo_jax.directions.kl import scale_by_kl_shampoo, scale_by_kl_soap
from shampoo_jax.directions.shampoo import scale_by_one_sided_shampoo, scale_by_shampoo
from shampoo_jax.directions.soap import scale_by_soap
from shampoo_jax.directions.walk import followed_by
from shampoo_jax.inspect.checkpoints import (
    check_state,
    state_layout,
    state_to_tree,
    tree_to_state,
)
from shampoo_jax.inspect.compiled import Compiled, compile_for, compile_update
from shampoo_jax.inspect.explanation import Report, explain, state_bytes
from shampoo_jax.inspect.meta_archive import meta_archive
from shampoo_jax.inspect.meta_import import import_meta_state
from shampoo_jax.inspect.programs import Program, exchanges, read_program
from shampoo_jax.inspect.targets import Target, target_devices
from shampoo_jax.matrix.polynomial import PrecisionPolicy
from shampoo_jax.optimizers import presets
from shampoo_jax.optimizers.aliases import kl_shampoo, kl_soap, one_sided_shampoo, shampoo, soap
from shampoo_jax.optimizers.averaging import averaging, eval_params
from shampoo_jax.optimizers.hyperball import hyperball, keep_norm, keep_radius, scale_to_norm
from shampoo_jax.optimizers.lookahead import ema_nesterov
from shampoo_jax.optimizers.microbatches import mean_of_squares
from shampoo_jax.optimizers.momentum import momentum
from shampoo_jax.optimizers.optimizer import as_optimizer
from shampoo_jax.optimizers.radial import cautious_decay, floor_update, radial_brake
from shampoo_jax.optimizers.routing import is_hidden_matrix
from shampoo_jax.optimizers.scaling import scale_per_parameter
from shampoo_jax.optimizers.schedules import power_cool, rise_and_fall
from shampoo_jax.optimizers.spectral import normalize_spectrum
from shampoo_jax.optimizers.tail import tail_average
from shampoo_jax.optimizers.transfer import Multipliers, TransferRules, transfer_rules
from shampoo_jax.optimizers.weight_decay import Decay, add_scheduled_weight_decay, decay_parts
from shampoo_jax.parts.blending import blend, trust_gate
from shampoo_jax.parts.caching import cached_scale
from shampoo_jax.parts.cross_fitting import cross_fitted_adam
from shampoo_jax.parts.eigenbasis import eigenbasis, in_eigenbasis
from shampoo_jax.parts.factors import (
    accumulate_factors,
    count_again,
    damp,
    normalize_by_trace,
)
from shampoo_jax.parts.filtering import filter_gradient, nesterov_average
from shampoo_jax.parts.grafting import graft, scale_by_second_moment
from shampoo_jax.parts.kl_eigenbasis import kl_eigenbasis
from shampoo_jax.parts.kl_factors import accumulate_kl_factors
from shampoo_jax.parts.lift import from_gradients, of_updates, on_gradients, on_updates
from shampoo_jax.parts.monitoring import monitor_spectrum, read_monitor
from shampoo_jax.parts.orthogonalization import orthogonalize
from shampoo_jax.parts.refresh import BasisRefresh, Refresh
from shampoo_jax.parts.roots import invert_roots, precondition
from shampoo_jax.solvers.bases import EighBasis, QRBasis
from shampoo_jax.solvers.carried import CarriedBasis
from shampoo_jax.solvers.eigh import Debiased, ShiftedEigh, TruncatedEigh
from shampoo_jax.solvers.iterated import IteratedRoot
from shampoo_jax.solvers.newton import CoupledNewton, HigherOrderNewton
from shampoo_jax.solvers.polynomial import Auto, Polynomial
from shampoo_jax.solvers.registry import make_solver, register_solver, solver_names
from shampoo_jax.solvers.solver import Cost, Solver
from shampoo_jax.stacks.blocked import FORMAT, blocked
from shampoo_jax.stacks.guard import check_finite, guard
from shampoo_jax.stacks.placement import Placement, state_shardings

# fmt: off
__all__ = [
    "Auto", "BasisRefresh", "Blocking", "Blocks", "CarriedBasis", "Compiled", "Cost",
    "CoupledNewton", "Debiased", "Decay", "DimensionNumbers", "EighBasis", "FORMAT",
    "HigherOrderNewton", "IteratedRoot", "MeanSquares", "Multipliers", "Placement", "Polynomial",
    "PrecisionPolicy", "Program", "QRBasis", "Refresh", "Report", "ShiftedEigh", "Solver", "Target",
    "TransferRules", "TruncatedEigh", "accumulate_factors", "accumulate_kl_factors",
    "add_scheduled_weight_decay", "as_optimizer", "averaging", "batch_axes", "blend", "blocked",
    "cached_scale", "cautious_decay", "check_finite", "check_state", "compile_for",
    "compile_update", "count_again", "cross_fitted_adam", "damp", "decay_parts",
    "default_dimension_numbers", "eigenbasis", "ema_nesterov", "eval_params", "exchanges",
    "explain", "filter_gradient", "floor_update", "followed_by", "from_gradients", "graft", "guard",
    "hyperball", "import_meta_state", "in_eigenbasis", "inject_hyperparams", "invert_roots",
    "is_hidden_matrix", "keep_norm", "keep_radius", "kl_eigenbasis", "kl_shampoo", "kl_soap",
    "make_solver", "mean_of_squares", "meta_archive", "momentum", "monitor_spectrum",
    "nesterov_average", "normalize_by_trace", "normalize_spectrum", "of_updates", "on_gradients",
    "on_updates", "one_sided_shampoo", "orthogonalize", "power_cool", "precondition", "presets",
    "radial_brake", "read_monitor", "read_program", "register_solver", "resolve_exponents",
    "rise_and_fall", "scale_by_kl_shampoo", "scale_by_kl_soap", "scale_by_one_sided_shampoo",
    "scale_by_second_moment", "scale_by_shampoo", "scale_by_soap", "scale_per_parameter",
    "scale_to_norm", "shampoo", "soap", "solver_names", "state_bytes", "state_layout",
    "state_shardings", "state_to_tree", "tail_average", "target_devices", "transfer_rules",
    "tree_to_state", "trust_gate",
]
# fmt: on
