"""Directions of the block matrices by settings: updates before weight decay and learning rate.

Gradients are sums over the tokens of a batch. What cannot split its state over a mesh leaves that
to the compiler.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import shampoo_jax
from nanogpt.config.settings import (
    KLConfig,
    LionConfig,
    MuonConfig,
    PMuonConfig,
    PsgdConfig,
    ShampooConfig,
    SoapConfig,
    SoapMuonConfig,
    SophiaConfig,
)
from nanogpt.optimizers.psgd import scale_by_psgd
from nanogpt.optimizers.shampoo_next import scale_by_aspect, shampoo_next

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


def adam(settings: Any, placement: Placement = None) -> optax.GradientTransformation:
    """Adam, of any settings with b1, b2 and eps."""
    return _split(optax.scale_by_adam(settings.b1, settings.b2, settings.eps), placement)


def uncorrected_adam(settings: Any, placement: Placement = None) -> optax.GradientTransformation:
    """Adam without bias correction, of parameters that are not cut."""
    average = shampoo_jax.filter_gradient(settings.b1, bias_correction=False)
    moment = shampoo_jax.scale_by_second_moment(settings.b2, settings.eps, bias_correction=False)
    whole: Any = {"blocking": shampoo_jax.Blocking(size=None), "placement": placement}
    return shampoo_jax.blocked(optax.chain(average, moment), **whole).inner


def muon(settings: MuonConfig, _: Placement = None) -> optax.GradientTransformation:
    """Optax's Muon, its defaults apart from what the settings name."""
    scaled = optax.contrib.scale_by_muon(
        settings.ns_coeffs, settings.ns_steps, settings.b1, weight_dimension_numbers=_in_out
    )
    return optax.chain(scaled, scale_by_aspect())


def muon_track3(settings: MuonConfig, placement: Placement = None) -> optax.GradientTransformation:
    """The benchmark's Muon: its own momentum, then Newton-Schulz.

    On a mesh every device orthogonalizes whole matrices of its own. Left to the compiler, each of
    the products is spread over all devices, and its operands are sent for it.
    """
    average = nesterov_ema(settings.b1)
    if settings.b1_warmup:
        average = optax.inject_hyperparams(nesterov_ema)(b1=momentum_schedule(settings))
    polar = _newton_schulz(settings, eps=1e-7)
    if placement is not None:
        whole: Any = {"blocking": shampoo_jax.Blocking(size=None), "placement": placement}
        polar = shampoo_jax.blocked(polar, chunk="auto", **whole).inner
    return optax.chain(_split(average, placement), polar, scale_by_aspect())


def momentum_schedule(settings: MuonConfig) -> optax.Schedule:
    """The decay of the benchmark's Muon at every step, which rises from 0.85."""
    return optax.linear_schedule(0.85, settings.b1, settings.b1_warmup)


def pmuon(settings: PMuonConfig, placement: Placement = None) -> optax.GradientTransformation:
    """PMuon: the momentum between two roots of its own factors, orthogonalized."""
    squares = shampoo_jax.accumulate_factors(settings.b2, bias_correction=False, weighted=False)
    least = settings.damping
    root = shampoo_jax.IteratedRoot(
        least, floor=least, eps=least, rtol=0.0, seed=settings.basis_seed
    )
    whitened = optax.chain(
        shampoo_jax.nesterov_average(settings.b1),
        shampoo_jax.of_updates(optax.chain(squares, shampoo_jax.count_again(settings.b2))),
        shampoo_jax.invert_roots(root),
        shampoo_jax.precondition(),
        _newton_schulz(settings, eps=settings.ns_eps),
    )
    whole = shampoo_jax.Blocking(size=None)
    frame: Any = {"exponents": settings.exponent, "chunk": "auto", "placement": placement}
    direction = shampoo_jax.blocked(whitened, blocking=whole, **frame)
    return optax.chain(direction.inner, scale_by_aspect())


def soap_muon(settings: SoapMuonConfig, placement: Placement = None) -> Any:
    """SOAP of the momentum, orthogonalized, its radial part braked, its length at least a share."""
    floor, cap = trust_schedules(settings)
    gate = functools.partial(
        shampoo_jax.trust_gate, least=settings.trust_least, floor=floor, cap=cap
    )
    mixed = {"gated": _soap(settings, gate, placement)}
    mixed["others"] = _soap(settings, shampoo_jax.blend, placement)
    brakes = optax.chain(
        scale_by_aspect(),
        shampoo_jax.radial_brake(settings.outward, settings.inward),
        # The rows of the benchmark's (out, in) matrices are the columns of kernels.
        shampoo_jax.floor_update(settings.length, axis=-1 if settings.by_row else None),
    )
    return optax.chain(optax.partition(mixed, _gated), _rounded(settings.ns_dtype, brakes))


def trust_schedules(settings: SoapMuonConfig) -> tuple[optax.Schedule, optax.Schedule]:
    """Floor and cap of SOAP's share in attention's projections, by step."""
    end = settings.trust_end
    floor = shampoo_jax.power_cool(settings.trust_floor, end, end - settings.trust_steps)
    return floor, lambda step: jnp.where(step < end, settings.trust_cap, 1.0)


def _soap(settings: SoapMuonConfig, mix: Callable[..., Any], placement: Placement) -> Any:
    """The momentum mixed with what SOAP makes of it, orthogonalized."""
    moment = shampoo_jax.scale_by_second_moment(
        settings.b2,
        0.0,
        exponent=settings.moment_exponent,
        bias_correction=False,
        floor=settings.moment_floor,
    )
    soap = shampoo_jax.eigenbasis(
        shampoo_jax.of_updates(moment),
        basis=shampoo_jax.QRBasis(sort="before"),
        every=settings.every,
        refresh=shampoo_jax.BasisRefresh(),
    )
    steps = {"warmup": settings.b1_warmup, "cooldown": settings.b1_cooldown, "end": settings.b1_end}
    parts = optax.chain(
        shampoo_jax.nesterov_average(
            shampoo_jax.rise_and_fall(settings.b1_low, settings.b1, **steps)
        ),
        shampoo_jax.accumulate_factors(settings.b2, bias_correction=False),
        mix(soap),
        _newton_schulz(settings, norm="schatten4"),
    )
    whole = shampoo_jax.Blocking(size=None)
    return shampoo_jax.blocked(parts, blocking=whole, chunk="auto", placement=placement).inner


def _newton_schulz(settings: MuonConfig | PMuonConfig | SoapMuonConfig, **form: Any) -> Any:
    dtype = None if settings.ns_dtype == "float32" else settings.ns_dtype
    chosen: Any = {"steps": settings.ns_steps, "coefficients": settings.ns_coeffs, "dtype": dtype}
    return shampoo_jax.orthogonalize(**chosen, **form)


def _gated(params: optax.Params) -> optax.Params:
    """Which matrices SOAP is trusted for by a gate: attention's projections."""

    def label(path: Any, _: Any) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return "gated" if name.endswith("/attn/proj/kernel") else "others"

    return jax.tree_util.tree_map_with_path(label, params)


def _rounded(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs stateless transformations on updates in bfloat16, if that is the dtype."""

    def update(updates, state, params=None):
        made, state = inner.update(_cast_tree(updates, dtype), state, params)
        return jax.tree.map(lambda new, u: new.astype(u.dtype), made, updates), state

    return inner if dtype == "float32" else optax.GradientTransformation(inner.init, update)


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
        monitor=settings.monitor,
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
    """SOAP as in the paper, with its bases kept where they will do, or as in result 27."""
    form: dict[str, Any] = {}
    if settings.form == "record27":
        form = shampoo_jax.presets.record_27()
    elif settings.tolerance is not None:
        form = {"basis": shampoo_jax.QRBasis(tolerance=settings.tolerance, sort="before")}
    chosen = {name: getattr(settings, name) for name in ("b1", "b2", "eps", "every", "monitor")}
    direction = shampoo_jax.scale_by_soap(**{**form, **chosen}, placement=placement)
    return direction if settings.tolerance is None else count_refreshes(direction)


class RefreshState(NamedTuple):
    """State of `count_refreshes`."""

    refreshed: jax.Array  # int32[], bases that got other columns so far
    inner: optax.OptState


def count_refreshes(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Counts the eigenbases of a direction of which a step changes more than the order.

    Args:
        inner: One whose state has fields called `bases`, stacks [N, d, d].

    Returns:
        The same transformation; the count is in its state, as `refreshed`.
    """
    tx = optax.with_extra_args_support(getattr(inner, "inner", inner))  # without its own guard

    def bases(state: optax.OptState) -> list[jax.Array]:
        return jax.tree.leaves([found for _, found in optax.tree.get_all_with_path(state, "bases")])

    def init(params):
        return RefreshState(jnp.zeros([], jnp.int32), tx.init(params))

    def update(updates, state, params=None, **extra: Any):
        updates, new = tx.update(updates, state.inner, params, **extra)
        pairs = zip(bases(new), bases(state.inner), strict=True)
        # Sorting columns anew is no other basis.
        changed = sum((jnp.sort(x) != jnp.sort(y)).any((1, 2)).sum() for x, y in pairs)
        return updates, RefreshState(state.refreshed + changed, new)

    return optax.GradientTransformationExtraArgs(init, update)


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


def _cast_tree(updates: optax.Updates, dtype: str) -> optax.Updates:
    return jax.tree.map(lambda update: update.astype(dtype), updates)


def _kl_options(settings: KLConfig) -> dict[str, Any]:
    names = ("b1", "b2", "eps", "every", "first_weight", "monitor")
    options = {name: getattr(settings, name) for name in names}
    return {**options, "max_scale": "size" if settings.max_scale is None else settings.max_scale}


_REST: Any = (
    muon,
    muon_track3,
    pmuon,
    soap_muon,
    shampoo,
    shampoo_next,
    soap,
    kl_shampoo,
    kl_soap,
    psgd,
    lion,
    sophia,
)
DIRECTIONS: dict[str, Direction] = {"adamw": adam} | {f.__name__: f for f in _REST}
