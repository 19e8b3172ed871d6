"""Directions of the block matrices by settings: updates before weight decay and learning rate.

Gradients are sums over the tokens of a batch. What cannot split its state over a mesh leaves that
to the compiler.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
import optax.contrib

import shampoo_jax
from nanogpt.config.settings import (
    KLConfig,
    LionConfig,
    MuonConfig,
    PsgdConfig,
    ShampooConfig,
    SoapConfig,
    SophiaConfig,
)
from nanogpt.optimizers.psgd import scale_by_psgd

Placement = shampoo_jax.Placement | None
Direction = Callable[[Any, Placement], optax.GradientTransformation]


class NesterovState(NamedTuple):
    """State of `nesterov_ema`."""

    mu: optax.Updates  # moving average of the gradients


def nesterov_ema(b1: Any) -> optax.GradientTransformation:
    """Momentum of the benchmark's Muon: m <- b1 m + (1 - b1) g; update b1 m + (1 - b1) g.

    Zero initial m and no bias correction, unlike `optax.contrib.scale_by_muon`.

    Args:
        b1: Decay.

    Returns:
        Optax transformation.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = nesterov_ema(0.5)
        >>> float(tx.update(jnp.float32(1.0), tx.init(jnp.float32(0.0)))[0])
        0.75
    """

    def mix(average: optax.Updates, updates: optax.Updates) -> optax.Updates:
        return jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, average, updates)

    def init(params):
        return NesterovState(optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        del params
        mu = mix(state.mu, updates)
        return mix(mu, updates), NesterovState(mu)

    return optax.GradientTransformation(init, update)


def scale_by_aspect() -> optax.GradientTransformation:
    """Multiplies an (in, out) kernel's update by sqrt(max(1, out / in)).

    Example:
        >>> import jax.numpy as jnp
        >>> tx = scale_by_aspect()
        >>> float(tx.update(jnp.ones((1, 4)), tx.init(None))[0][0, 0])
        2.0
    """
    return optax.stateless_with_tree_map(
        lambda update, _: update * max(1.0, update.shape[1] / update.shape[0]) ** 0.5
    )


def adam(settings: Any, placement: Placement = None) -> optax.GradientTransformation:
    """Adam, of any settings with b1, b2 and eps."""
    return _split(optax.scale_by_adam(settings.b1, settings.b2, settings.eps), placement)


def muon(settings: MuonConfig, _: Placement = None) -> optax.GradientTransformation:
    """Optax's Muon, its defaults apart from what the settings name."""
    scaled = optax.contrib.scale_by_muon(
        settings.ns_coeffs, settings.ns_steps, settings.b1, weight_dimension_numbers=_in_out
    )
    return optax.chain(scaled, scale_by_aspect())


def muon_track3(settings: MuonConfig, _: Placement = None) -> optax.GradientTransformation:
    """The benchmark's Muon: its own momentum, then Optax's orthogonalization alone."""
    orthogonalize = optax.contrib.scale_by_muon(
        settings.ns_coeffs,
        settings.ns_steps,
        beta=0.0,
        eps=1e-7,
        nesterov=False,
        weight_dimension_numbers=_in_out,
    )
    average = nesterov_ema(settings.b1)
    if settings.b1_warmup:
        rise = optax.linear_schedule(0.85, settings.b1, settings.b1_warmup)
        average = optax.inject_hyperparams(nesterov_ema)(b1=rise)
    return optax.chain(average, _cast(settings.ns_dtype), orthogonalize, scale_by_aspect())


def shampoo(settings: ShampooConfig, placement: Placement = None) -> optax.GradientTransformation:
    """Two-sided Shampoo, its updates of Adam's norm or of a fixed one."""
    solvers: dict[str, Any] = {
        "shift": shampoo_jax.ShiftedEigh(settings.damping),
        "positive": shampoo_jax.TruncatedEigh(rtol=0.0),
        "relative": shampoo_jax.make_solver(settings.solver),
    }
    solver, statistics = solvers[settings.cutoff], "gradients"
    if settings.statistics != "batch":
        statistics = shampoo_jax.accumulate_factors(settings.b2, microbatches="microbatches")
    if settings.statistics == "corrected":
        solver = shampoo_jax.Debiased(solver)
    rows = settings.size == "rows"
    adam = shampoo_jax.scale_by_second_moment(settings.graft_b2, settings.graft_eps)
    direction = shampoo_jax.scale_by_shampoo(
        settings.b1,
        settings.b2,
        blocking=shampoo_jax.Blocking(settings.block_size),
        exponents=settings.exponent,
        statistics=statistics,
        solver=solver,
        every=settings.every,
        graft=None if rows else adam,
        placement=placement,
    )
    # The rows of the benchmark's (out, in) matrices are the columns of kernels.
    fixed = shampoo_jax.scale_to_norm(lambda kernel: kernel.shape[1] ** 0.5)
    direction = cross_fitted(direction) if settings.cross_fit else direction
    return optax.chain(direction, fixed) if rows else direction


def cross_fitted(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Gives a direction the mean gradient of the first half of the microbatches, and the others.

    Args:
        inner: Its statistics are those of `further["microbatches"]`.

    Returns:
        Optax transformation that takes no notice of the gradient itself but for its tree.
    """
    tx = optax.with_extra_args_support(getattr(inner, "inner", inner))  # without its own guard

    def update(updates, state, params=None, *, further: Any, **extra: Any):
        given = dict(jax.tree_util.tree_leaves_with_path(further["microbatches"]))
        own = {path: given[path] for path, _ in jax.tree_util.tree_leaves_with_path(updates)}
        half = max(1, len(next(iter(own.values()))) // 2)
        first = jax.tree_util.tree_map_with_path(lambda path, _: own[path][:half].mean(0), updates)
        rest = {"microbatches": jax.tree.map(lambda x: x[half:], further["microbatches"])}
        return tx.update(first, state, params, further=rest, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def soap(settings: SoapConfig, placement: Placement = None) -> optax.GradientTransformation:
    """SOAP as in the paper or as in result 27."""
    form = shampoo_jax.presets.record_27() if settings.form == "record27" else {}
    chosen = {name: getattr(settings, name) for name in ("b1", "b2", "eps", "every")}
    return shampoo_jax.scale_by_soap(**{**form, **chosen}, placement=placement)


def kl_shampoo(settings: KLConfig, placement: Placement = None) -> optax.GradientTransformation:
    """KL-Shampoo on gradients divided by the tokens."""
    return optax.chain(
        optax.scale(1 / settings.tokens),
        shampoo_jax.scale_by_kl_shampoo(**_kl_options(settings), placement=placement),
    )


def kl_soap(settings: KLConfig, placement: Placement = None) -> optax.GradientTransformation:
    """KL-SOAP on gradients divided by the tokens."""
    return optax.chain(
        optax.scale(1 / settings.tokens),
        shampoo_jax.scale_by_kl_soap(**_kl_options(settings), placement=placement),
    )


def psgd(settings: PsgdConfig, _: Placement = None) -> optax.GradientTransformation:
    """PSGD-Kron."""
    return scale_by_psgd(settings.b1, settings.preconditioner_rate, settings.preconditioner_seed)


def lion(settings: LionConfig, placement: Placement = None) -> optax.GradientTransformation:
    """Optax's Lion."""
    return _split(optax.scale_by_lion(settings.b1, settings.b2), placement)


def sophia(settings: SophiaConfig, _: Placement = None) -> optax.GradientTransformation:
    """Optax's Sophia-H; its update wants `obj_fn`, the summed loss as a function of parameters."""
    probe = optax.contrib.hutchinson_estimator_diag_hessian(jax.random.PRNGKey(settings.probe_seed))
    descent = optax.contrib.sophia(
        1.0,
        settings.b1,
        settings.b2,
        settings.eps,
        weight_decay=0.0,
        gamma=settings.gamma,
        update_interval=settings.every,
        hessian_diagonal_fn=probe,
    )
    # Optax has the direction only inside the complete optimizer, which turns its sign.
    return optax.chain(descent, optax.scale(-1.0))


def _split(tx: optax.GradientTransformation, placement: Placement) -> optax.GradientTransformation:
    return tx if placement is None else placement.elementwise(tx)


def _in_out(updates: optax.Updates) -> optax.Params:
    """Names the axes of (in, out) kernels; Optax 0.2.8 takes a tree of matrices no other way."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), updates)


def _cast(dtype: str) -> optax.GradientTransformation:
    return optax.stateless_with_tree_map(lambda update, _: update.astype(dtype))


def _kl_options(settings: KLConfig) -> dict[str, Any]:
    names = ("b1", "b2", "eps", "every", "first_weight")
    options = {name: getattr(settings, name) for name in names}
    return {**options, "max_scale": "size" if settings.max_scale is None else settings.max_scale}


_REST: Any = (muon, muon_track3, shampoo, soap, kl_shampoo, kl_soap, psgd, lion, sophia)
DIRECTIONS: dict[str, Direction] = {"adamw": adam} | {f.__name__: f for f in _REST}
