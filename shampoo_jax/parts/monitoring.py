"""Telemetry: what the factors, their roots and the graft look like while training."""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shampoo_jax.base.options import check_options
from shampoo_jax.base.paths import name_of, nodes_of
from shampoo_jax.blocks.blocks import Blocks, Part
from shampoo_jax.matrix.eigh import eigh, power_of_two_scale
from shampoo_jax.matrix.products import identity_like, matmul
from shampoo_jax.parts.filtering import counted
from shampoo_jax.parts.refresh import refresh_due, when

Array = jax.Array
Figures = dict[str, Array]

# Figures of one dimension of a stack, and of a whole stack; each is an array [N].
SPECTRUM_FIGURES = ("effective_rank", "kept_rank", "condition_number", "dropped_energy")
DIMENSION_FIGURES = (*SPECTRUM_FIGURES, "root_residual", "rotation", "capped")
STACK_FIGURES = ("graft_ratio", "failures", "fallbacks")


class MonitorState(NamedTuple):
    """State of `monitor_spectrum`; read it with `read_monitor`."""

    count: Array  # int32[], steps taken
    figures: Any  # per stack {"0": {"effective_rank": [N], ...}, ..., "graft_ratio": [N], ...}


def monitor_spectrum(*, every: int | Array = 1) -> Part:
    """Passes updates through unchanged and keeps figures about their preconditioner.

    It stands last in the walk, after `graft` (after `precondition` or the eigenbasis part if there
    is no graft): there a stack holds the matrices that were applied, and what earlier parts
    reported. Per dimension, for a factor `A` and its root `X = A^(-e)`:

      - `effective_rank`: `tr(A)^2 / |A|_F^2`, the participation ratio of the spectrum, 1 to d; it
        needs no decomposition. 0 for the zero matrix.
      - `kept_rank`: number of directions in which `X` is not zero.
      - `condition_number`: of `A` on the kept directions as the root sees it,
        `(x_max / x_min)^(1/e)`; 0 if none is kept.
      - `dropped_energy`: share of `tr(A)` in directions that were dropped, 0 to 1.
      - `root_residual`: `|X^(p/2) A X^(p/2) - P|_F / sqrt(rank)` with `p = 1/e` and `P` the
        projector onto the kept directions. It holds the solver's error, its damping, and, between
        refreshes, how far `A` has moved since.
      - `rotation`: angle in radians by which the eigenbasis turned at its last refresh,
        `arccos(sqrt(sum_i w_i max_j <q_i, old_j>^2))` with weights `w` the share of `q_i` in
        `tr(A)`; 0 if only order and signs changed, and for parts that keep no basis.
      - `capped`: share of the eigenvalues that KL-Shampoo and KL-SOAP track which are at their
        bound, see `kl_eigenbasis`; 1 in all dimensions of a block means that its gradients are too
        small for `max_scale`. 0 for other parts.

    For an eigenbasis `Q` the estimates `diag(Q^T A Q)` take the place of the spectrum, directions
    above `d * eps` times the largest count as kept, and the residual is 0.

    Per stack: `graft_ratio`, the factor by which grafting stretched the direction, `failures`,
    refreshes so far that kept an old root, and `fallbacks`, roots so far that polynomials left to
    eigh. All figures are 0 until the first step that
    preconditions, and where no part reports them.

    Roots are decomposed once more for this, independently of the solver, so a step that records
    costs about two refreshes; other steps cost nothing, nor does a walk without this part.

    Args:
      every: Steps between records, at least 1.

    Returns:
      A part that changes no update. Its state holds a few numbers per block.

    Raises:
      ValueError: `every` below 1; in `update`, no part before it reported a factor.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> walk = optax.chain(
      ...     shampoo_jax.accumulate_factors(),
      ...     shampoo_jax.invert_roots(),
      ...     shampoo_jax.precondition(),
      ...     monitor_spectrum(),
      ... )
      >>> tx = shampoo_jax.blocked(walk)
      >>> params = {"w": jnp.ones((3, 2))}
      >>> _, state = tx.update({"w": jnp.eye(3, 2)}, tx.init(params))
      >>> figures = read_monitor(state)
      >>> [float(figures[key]["kept_rank"][0]) for key in ("3x2/0", "3x2/1")]
      [2.0, 2.0]
    """
    check_options({"every": every})

    def step(count: Array, b: Blocks, old: dict[str, Any]) -> tuple[Blocks, dict[str, Any]]:
        return b, when(refresh_due(count, every, 1), functools.partial(_record, b), old)

    return counted(MonitorState, _no_figures, step)


def _no_figures(p: Blocks) -> dict[str, Any]:
    def zeros(names: tuple[str, ...]) -> dict[str, Any]:
        # One array a figure: donating a state that names a buffer twice is an error.
        return {name: jnp.zeros(len(p.update), p.update.dtype) for name in names}

    dimensions = {str(k): zeros(DIMENSION_FIGURES) for k, e in enumerate(p.exponents) if e}
    return dimensions | zeros(STACK_FIGURES)


def _record(b: Blocks, old: dict[str, Any]) -> dict[str, Any]:
    """New figures of one stack, or the old ones while its preconditioner is not in use."""
    new: dict[str, Any] = {name: b.figures.get(name, old[name]) for name in STACK_FIGURES}
    for k, exponent in enumerate(b.exponents):
        if not exponent:
            continue
        factor, basis = b.figures.get(f"factor/{k}"), b.figures.get(f"basis/{k}")
        matrix = b.per_dimension[k] if basis is None else basis
        if factor is None or matrix is None:
            raise ValueError(
                f"monitor_spectrum found no factor of dimension {k} in a stack of blocks of shape "
                f"{b.update.shape[1:]}: place it after invert_roots or the eigenbasis part."
            )
        scale = power_of_two_scale(factor)
        if basis is None:
            figures = _root_figures(factor / scale, matrix * scale**exponent, exponent)
        else:
            previous, rotation = b.figures[f"previous/{k}"], old[str(k)]["rotation"]
            figures = _basis_figures(factor / scale, matrix, previous, rotation)
            if f"capped/{k}" in b.figures:
                figures["capped"] = b.figures[f"capped/{k}"]
        new[str(k)] = {name: figures.get(name, old[str(k)][name]) for name in DIMENSION_FIGURES}
    return jax.tree.map(lambda n, o: jnp.where(b.ready, n, o).astype(o.dtype), new, old)


def _root_figures(factor: Array, root: Array, exponent: float) -> Figures:
    """Figures of factors `[N, d, d]` and their roots, in the eigenbasis of the roots."""
    values, vectors = eigh(root)
    # Dropped directions carry rounding noise of a few eps; kept ones reach down to a hundredth of
    # the largest or so, because a root compresses the spectrum.
    noise = 4 * np.sqrt(values.shape[-1]) * float(jnp.finfo(values.dtype).eps)
    kept = values > noise * values[:, -1:]
    # X^(p/2), bounded by dividing by X's largest eigenvalue inside the power.
    half = jnp.where(kept, values, 0.0) ** (0.5 / exponent)
    rotated = matmul(jnp.matrix_transpose(vectors), matmul(factor, vectors))
    product = half[:, :, None] * rotated * half[:, None, :]
    residual = product - kept[:, :, None] * identity_like(factor)
    figures = _spectrum_figures(factor, jnp.linalg.diagonal(rotated), kept, values, 1 / exponent)
    rank = jnp.maximum(figures["kept_rank"], 1)
    return figures | {"root_residual": jnp.linalg.norm(residual, axis=(1, 2)) / jnp.sqrt(rank)}


def _basis_figures(factor: Array, basis: Array, previous: Array, rotation: Array) -> Figures:
    """Figures of factors `[N, d, d]` and their eigenbases, now and before this step."""
    values = jnp.maximum(
        jnp.linalg.diagonal(matmul(jnp.matrix_transpose(basis), matmul(factor, basis))), 0.0
    )
    noise = values.shape[-1] * float(jnp.finfo(values.dtype).eps)
    kept = values > noise * values.max(-1, keepdims=True)
    turned = (basis != previous).any((1, 2))
    angle = jnp.where(turned, rotation_angle(basis, previous, values), rotation)
    return _spectrum_figures(factor, values, kept, values) | {"rotation": angle}


def _spectrum_figures(
    factor: Array, energies: Array, kept: Array, spectrum: Array, power: float = 1.0
) -> Figures:
    """Figures of both kinds: `energies` in each direction, `spectrum^power` as it is used."""
    energies, rank = jnp.maximum(energies, 0.0), kept.sum(-1)
    total = energies.sum(-1)
    largest = jnp.max(spectrum, axis=-1, where=kept, initial=0.0)
    smallest = jnp.min(spectrum, axis=-1, where=kept, initial=jnp.inf)
    return {
        "effective_rank": effective_rank(factor),
        "kept_rank": rank,
        "condition_number": (largest / smallest) ** power,  # 0 / inf where none is kept
        "dropped_energy": jnp.where(kept, 0.0, energies).sum(-1) / jnp.where(total > 0, total, 1.0),
    }


def effective_rank(factor: Array) -> Array:
    """Participation ratio `tr(A)^2 / |A|_F^2` of a positive semi-definite stack; 0 for zero.

    It is the number of equal eigenvalues that would give the same trace and norm.

    Args:
      factor: `[N, d, d]`.

    Returns:
      `[N]`, between 1 and d.

    Example:
      >>> import jax.numpy as jnp
      >>> effective_rank(jnp.diag(jnp.array([2.0, 2.0, 0.0]))[None]).tolist()
      [2.0]
    """
    factor = factor / power_of_two_scale(factor)
    trace, square = jnp.linalg.diagonal(factor).sum(-1), jnp.sum(factor * factor, axis=(1, 2))
    return jnp.where(square > 0, trace * trace / jnp.where(square > 0, square, 1.0), 0.0)


def rotation_angle(basis: Array, previous: Array, weights: Array) -> Array:
    """Angle in radians between two orthogonal bases, whatever the order and signs of columns.

    `arccos(sqrt(sum_i w_i max_j <q_i, old_j>^2))`, weights scaled to sum 1.

    Args:
      basis: `[N, d, d]`, columns `q_i`.
      previous: `[N, d, d]`.
      weights: `[N, d]`, non-negative: how much each column of `basis` counts.

    Returns:
      `[N]`, between 0 and pi/2; 0 where all weights are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> swapped = jnp.array([[[0.0, 1.0], [-1.0, 0.0]]])
      >>> rotation_angle(swapped, jnp.eye(2)[None], jnp.ones((1, 2))).tolist()
      [0.0]
    """
    overlaps = matmul(jnp.matrix_transpose(basis), previous)
    nearest = jnp.argmax(jnp.abs(overlaps), axis=-1)
    total = weights.sum(-1)
    # The distance from the nearest old column, sin(angle), keeps small angles: 1 - cos^2 cancels.
    near = jnp.take_along_axis(previous, nearest[:, None, :], axis=2)
    sign = jnp.sign(jnp.sum(basis * near, axis=1, keepdims=True))
    chord = jnp.sum((basis - sign * near) ** 2, axis=1)
    sine_squared = chord * (1 - chord / 4)
    mean = jnp.sum(weights * sine_squared, -1) / jnp.where(total > 0, total, 1.0)
    return jnp.arcsin(jnp.sqrt(jnp.clip(mean, 0.0, 1.0)))


def read_monitor(opt_state: Any) -> dict[str, dict[str, np.ndarray]]:
    """The figures of every `monitor_spectrum` in an optimizer state, ready for logging.

    Args:
      opt_state: State of any Optax transformation that holds a monitor, nested in chains,
        partitions, wrappers as deep as it may be.

    Returns:
      `{"3072x768/0": {"effective_rank": [N], ...}, "3072x768": {"graft_ratio": [N], ...}}`:
      stack and dimension, then figure, then one number per block. With several monitors the keys
      start with each one's place in the state. Copies to the host, so it waits for the step.
      Warns where all tracked eigenvalues of a block are at their bound.

    Raises:
      ValueError: The state holds no monitor.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> tx = shampoo_jax.scale_by_shampoo(monitor=10)
      >>> grads = {"w": jnp.ones((3, 2))}  # of rank one
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> figures = read_monitor(state)
      >>> sorted(figures), figures["3x2/0"]["effective_rank"].round(3).tolist()
      (['3x2', '3x2/0', '3x2/1'], [1.0])
    """
    found = nodes_of(MonitorState, opt_state)
    if not found:
        raise ValueError("no MonitorState in this state: set monitor, or add monitor_spectrum().")
    result: dict[str, dict[str, np.ndarray]] = {}
    for place, state in found:
        place = place if len(found) > 1 else ()
        for path, value in jax.tree_util.tree_leaves_with_path(state.figures):
            key, name = name_of((*place, *path[:-1])), name_of(path[-1:])
            result.setdefault(key, {})[name] = np.asarray(value)
    _warn_of_caps(result)
    return result


def _warn_of_caps(found: dict[str, dict[str, np.ndarray]]) -> None:
    """Warns of stacks with blocks whose tracked eigenvalues are all at their bound."""
    by_stack: dict[str, list[np.ndarray]] = {}
    for key, figures in found.items():
        if "capped" in figures:
            by_stack.setdefault(key.rpartition("/")[0], []).append(figures["capped"] == 1)
    for key, capped in by_stack.items():
        if np.all(capped, 0).any():
            warnings.warn(
                f"all eigenvalues of blocks {key} are at their bound, so that only the scale of "
                "their gradients changes: these are too small for max_scale, multiply the loss by "
                "a constant or set max_scale='relative'.",
                stacklevel=3,
            )
