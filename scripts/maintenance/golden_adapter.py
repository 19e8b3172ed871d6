"""Builds the optimizer that a recorded trajectory's config describes in neutral words."""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shampoo_jax as sj
from scripts.maintenance import golden_format
from shampoo_jax.matrix import newton_schulz, svd_orthogonalize

MAX_ROOT = 64  # terms of the fractions that the reference's higher-order iteration can take
QUINTIC = (3.4445, -4.775, 2.0315)  # the reference's default coefficients

Config = dict[str, Any]
Transformation = optax.GradientTransformation


def optimizer(config: Config) -> Transformation:
    """The full optimizer: direction, decay, momentum or averaging, learning rates, missing updates.

    Args:
      config: A file's config, with its per-step `learning_rates` added.

    Returns:
      The transformation; None leaves in its updates are missing gradients.

    Raises:
      ValueError: the config has a key, value or combination that the format has not.
    """
    golden_format.check({k: v for k, v in config.items() if k != "learning_rates"})
    # The reference casts its rate to float32 even where parameters are float64.
    rates = jnp.asarray(np.float32(config["learning_rates"]), config["dtype"])

    def learning_rate(count: jax.Array) -> jax.Array:
        return rates[count]

    before, after = [], []
    if config["weight_decay"]:
        before, after = sj.decay_parts(
            config["weight_decay"],
            decay_form(config),
            learning_rate,
        )
    momentum = config["momentum"]
    averaging = config["averaging"]
    if averaging:
        inner = optax.chain(*before, direction(config), optax.scale_by_learning_rate(learning_rate))
        return sj.guard(averaged(inner, averaging, learning_rate, after))
    if momentum:
        after = [
            *after,
            sj.momentum(momentum["momentum"], momentum["dampening"], momentum["nesterov"]),
        ]
    return sj.guard(
        optax.chain(*before, direction(config), *after, optax.scale_by_learning_rate(learning_rate))
    )


def decay_form(config: Config) -> sj.Decay:
    """The kind of weight decay, with the peak that the relative kinds divide by."""
    kind = config["weight_decay_kind"]
    relative = kind in ("lr_over_peak", "over_peak")
    return sj.Decay(kind, float(np.max(config["learning_rate"])) if relative else None)


def averaged(
    inner: Transformation, averaging: Config, learning_rate: Any, decay: list[Transformation]
) -> Transformation:
    """Iterate averaging around an optimizer."""
    return sj.averaging(
        inner,
        averaging["kind"],
        learning_rate=learning_rate,
        train_coeff=averaging["train_coeff"],
        eval_coeff=averaging.get("eval_coeff"),
        lr_power=averaging.get("lr_power"),
        decay=decay[0] if decay else None,
    )


def direction(config: Config) -> Transformation:
    """The direction of a config, without decay and learning rate."""
    preconditioner = config["preconditioner"]
    kind = preconditioner["kind"]
    scaled = preconditioner["trace_scaling"] is not None
    if kind == "eigenbasis_adam":
        return scaled_soap(config) if scaled else soap(config)
    if kind in ("kronecker_root", "kronecker_eig", "kl_root", "kl_eig"):
        return walk(config, scaled_shampoo(config)) if scaled else shampoo(config)
    start = config["first_refresh_step"]
    first = config["refresh_interval"] if start == -1 else start
    return walk(config, optax.chain(diagonal(preconditioner, kind), ready_from(first)))


def walk(config: Config, inner: Transformation) -> Transformation:
    """First moment and a part that makes a direction, grafted, on blocks."""
    b3 = config["beta1_output"] if config["beta1"] else None
    graft = magnitude(config["graft"])
    return sj.blocked(
        optax.chain(
            sj.filter_gradient(config["beta1"], b3, bias_correction=config["bias_correction"]),
            inner if graft is None else sj.graft(graft, inner),
        ),
        blocking=blocking(config),
        exponents=exponents(config) if kronecker(config) else skipped(config),
    )


def kronecker(config: Config) -> bool:
    """Whether the preconditioner has roots, not bases."""
    return config["preconditioner"]["kind"] != "eigenbasis_adam"


def shampoo(config: Config) -> Transformation:
    """Kronecker factors and cached roots."""
    return sj.scale_by_shampoo(
        config["beta1"],
        config["beta2"],
        b3=config["beta1_output"] if config["beta1"] else None,
        bias_correction=config["bias_correction"],
        exponents=exponents(config),
        weighted=not config["preconditioner"]["unweighted_update"],
        statistics=statistics(config),
        solver=solver(config),
        every=config["refresh_interval"],
        refresh=sj.Refresh(start(config)),
        graft=magnitude(config["graft"]),
        blocking=blocking(config),
    )


def soap(config: Config) -> Transformation:
    """Adam in the eigenbasis, in the reference's form."""
    preconditioner = config["preconditioner"]
    return sj.scale_by_soap(
        config["beta1"],
        config["beta2"],
        b3=config["beta1_output"] if config["beta1"] else None,
        eps=config["epsilon"],
        exponent=second_exponent(config),
        bias_correction=config["bias_correction"],
        weighted=not preconditioner["unweighted_update"],
        exponents=skipped(config),
        basis=basis(preconditioner["solver"]),
        damping=damping(config),
        every=config["refresh_interval"],
        refresh=basis_refresh(config),
        graft=magnitude(config["graft"]),
        blocking=blocking(config),
    )


def scaled_soap(config: Config) -> Transformation:
    """Adam in the eigenbasis of factors that are divided by their trace first."""
    preconditioner = config["preconditioner"]
    weighting = dict(
        bias_correction=config["bias_correction"],
        weighted=not preconditioner["unweighted_update"],
    )
    second = sj.scale_by_second_moment(
        config["beta2"], config["epsilon"], exponent=second_exponent(config), **weighting
    )
    return walk(
        config,
        optax.chain(
            sj.accumulate_factors(config["beta2"], **weighting),
            sj.normalize_by_trace(preconditioner["trace_scaling"], config["epsilon"]),
            sj.damp(damping(config)),
            sj.eigenbasis(
                second,
                basis=basis(preconditioner["solver"]),
                every=config["refresh_interval"],
                refresh=basis_refresh(config),
            ),
        ),
    )


def skipped(config: Config) -> dict[int, dict[int, float]] | None:
    """Dimensions that are not rotated, as exponents of 0."""
    entries = config["preconditioner"]["skip_basis"].items()
    return {int(order): dict.fromkeys(dims, 0.0) for order, dims in entries} or None


def second_exponent(config: Config) -> Callable[[int], float]:
    """Exponent of the second moment by block order."""
    override = config["preconditioner"]["exponents"]
    return lambda order: float(override.get(str(order), 0.5))


def damping(config: Config) -> float:
    """What is added to factors before their basis is computed."""
    return config["epsilon"] if config["preconditioner"]["rank"].get("before") else 0.0


def ready_from(start: int) -> Transformation:
    """Marks stacks as ready from a step on: until then a graft steps alone."""

    def update(stacks: Any, count: jax.Array, params: Any = None) -> tuple[Any, Any]:
        del params
        count = optax.safe_increment(count)
        ready = count >= start
        return {key: dataclasses.replace(b, ready=ready) for key, b in stacks.items()}, count

    return optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), update)


def diagonal(preconditioner: Config, kind: str) -> Transformation:
    """A direction without factors."""
    match kind:
        case "identity":
            return sj.on_updates(optax.identity())
        case "adam" | "rmsprop" | "adagrad":
            part = magnitude(preconditioner)
            assert part is not None
            return part
        case "sign":
            return sj.on_updates(optax.stateless(sign(preconditioner.get("scale"))))
        case "orthogonal":
            return sj.on_updates(optax.stateless(orthogonal(preconditioner)))
    raise ValueError(f"preconditioner kind {kind!r} is not in the format.")


def statistics(config: Config) -> Literal["gradients", "kl"]:
    """What factors are made of."""
    return "kl" if config["preconditioner"]["kind"].startswith("kl") else "gradients"


def scaled_shampoo(config: Config) -> Transformation:
    """Roots of factors that are divided by their trace first, and their application."""
    preconditioner = config["preconditioner"]
    refresh = sj.Refresh(start(config))
    roots = optax.chain(
        sj.normalize_by_trace(preconditioner["trace_scaling"], config["epsilon"]),
        sj.invert_roots(solver(config), every=config["refresh_interval"], refresh=refresh),
    )
    form: Config = dict(
        bias_correction=config["bias_correction"],
        weighted=not preconditioner["unweighted_update"],
    )
    if statistics(config) == "kl":
        roots = sj.accumulate_kl_factors(roots, config["beta2"], **form)
    else:
        roots = optax.chain(sj.accumulate_factors(config["beta2"], **form), roots)
    return optax.chain(roots, sj.precondition())


def solver(config: Config) -> sj.Solver:
    """The inverse-root solver of a config."""
    chosen, rank = config["preconditioner"]["solver"], config["preconditioner"]["rank"]
    kept = carried_solver(config)
    if kept is not None:
        return kept
    match chosen["kind"]:
        case "newton":
            check_fractions(config, 1)
            # The reference accepts every finite root.
            return sj.CoupledNewton(
                config["epsilon"],
                chosen.get("max_iterations", 100),
                chosen.get("tolerance", 1e-6),
                max_residual=math.inf,
            )
        case "newton_high_order":
            check_fractions(config, MAX_ROOT)
            return sj.HigherOrderNewton(
                chosen["rel_epsilon"],
                chosen["abs_epsilon"],
                chosen.get("max_iterations", 100),
                chosen.get("tolerance", 1e-8),
                chosen.get("order", 3),
            )
    if rank["kind"] == "pseudo":
        return sj.TruncatedEigh(rank["rtol"], rank["atol"])
    return sj.ShiftedEigh(config["epsilon"], rank["before"])


def check_fractions(config: Config, largest_denominator: int) -> None:
    """Refuses exponents whose coupled iteration fails at every refresh of the reference.

    The reference takes `1 / exponent` as the fraction that the float is: 1/3 gives 3, 3/4 no 4/3.
    """
    kind = config["preconditioner"]["solver"]["kind"]
    for exponent in given(exponents(config)):
        if Fraction(1 / exponent).denominator > largest_denominator:
            raise ValueError(
                f"preconditioner.exponents has {exponent} with solver {kind!r}, which cannot "
                "compute this root in the reference: not in the format."
            )


def given(option: dict[int, Any] | None) -> set[float]:
    """The non-zero exponents that a config names."""
    entries = [e.values() if isinstance(e, dict) else (e,) for e in (option or {}).values()]
    return {float(x) for values in entries for x in values} - {0.0}


def of_roots(config: Config) -> dict[str, Any]:
    """What `import_meta_state` has to know of the optimizer to make roots."""
    return {"solver": carried_solver(config), "exponents": exponents(config)}


def carried_solver(config: Config) -> sj.CarriedBasis | None:
    """The solver of a config that keeps the eigendecomposition between refreshes."""
    if not config["preconditioner"]["kind"].endswith("_eig"):
        return None
    method, rank = basis(config["preconditioner"]["solver"]), config["preconditioner"]["rank"]
    if rank["kind"] == "pseudo":
        return sj.CarriedBasis(method, rtol=rank["rtol"], atol=rank["atol"])
    return sj.CarriedBasis(method, config["epsilon"], before=rank["before"])


def basis(chosen: Config) -> sj.EighBasis | sj.QRBasis:
    """How eigenbases are refreshed."""
    tolerance = chosen.get("tolerance") or 0.0
    if chosen["kind"] == "qr":
        return sj.QRBasis(chosen.get("max_iterations", 1), tolerance)
    return sj.EighBasis(tolerance)


def magnitude(entry: Config) -> Transformation | None:
    """A diagonal method, as a graft or as the preconditioner; None for no graft."""
    kind: str = entry["kind"]
    b2: Any = entry.get("beta2")
    eps: Any = entry.get("epsilon")
    weighted = not entry.get("unweighted_update", False)
    match kind:
        case "none":
            return None
        case "sgd":
            return sj.on_updates(optax.identity())
        case "adagrad":
            return sj.scale_by_second_moment(1.0, eps)
        case "rmsprop" | "adam":
            if b2 == 1 and weighted:
                raise ValueError(
                    f"beta2={b2} of {kind} leaves the second moment at 0 in the reference: not in "
                    "the format. Use adagrad for a sum."
                )
            return sj.scale_by_second_moment(
                b2, eps, bias_correction=kind == "adam", weighted=weighted
            )
    raise ValueError(f"graft kind {kind!r} is not in the format.")


def sign(scale: str | None) -> Callable[[Any, Any], Any]:
    """Sign of a stack, optionally times each block's L1 norm."""

    def one(x: jax.Array) -> jax.Array:
        axes = tuple(range(1, x.ndim))
        size = jnp.sum(jnp.abs(x), axis=axes, keepdims=True) if scale == "l1_norm" else 1.0
        return jnp.sign(x) * size

    return lambda updates, params: jax.tree.map(one, updates)


def orthogonal(preconditioner: Config) -> Callable[[Any, Any], Any]:
    """Orthogonalized stack of matrices, scaled by their shape."""
    chosen = preconditioner["solver"]

    def one(x: jax.Array) -> jax.Array:
        if x.ndim != 3:
            raise ValueError(
                f"preconditioner.kind='orthogonal' needs matrices, a block has shape {x.shape[1:]}:"
                " not in the format."
            )
        rows, columns = x.shape[1:]
        if chosen["kind"] == "svd":
            nuclear = preconditioner.get("nuclear_norm", False)
            x = svd_orthogonalize(x, scale_by_nuclear_norm=nuclear)
        else:
            coefficients = chosen.get("coefficients", QUINTIC)
            x = newton_schulz(x, chosen.get("iterations", 5), coefficients, 1e-8)
        scaled = preconditioner.get("scale") == "sqrt_max1_rows_over_cols"
        return x * math.sqrt(max(1.0, rows / columns)) if scaled else x

    return lambda updates, params: jax.tree.map(one, updates)


def exponents(config: Config) -> dict[int, Any] | None:
    """The config's exponent overrides with integer keys."""
    override = config["preconditioner"]["exponents"]
    if not override:
        return None
    return {
        int(order): {int(k): v for k, v in e.items()} if isinstance(e, dict) else e
        for order, e in override.items()
    }


def start(config: Config) -> int | None:
    """First refresh."""
    first = config["first_refresh_step"]
    return None if first == -1 else first


def basis_refresh(config: Config) -> sj.BasisRefresh:
    """First refresh of bases, in the reference's order."""
    return sj.BasisRefresh(start(config), when="before", skip_first=False, reorder=False)


def blocking(config: Config) -> sj.Blocking:
    """Block size and merging, no other reading; the config's `"inf"` is None here."""
    sizes = (config["max_block_dim"], config["merge_target_order"])
    size, merge = (None if value == "inf" else value for value in sizes)
    return sj.Blocking(size, merge, canonical=False, dimension_numbers=None)
