"""Builds the optimizer that a recorded trajectory's config describes in neutral words."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shampoo_jax as sj
from shampoo_jax.matrix import orthogonalize

Config = dict[str, Any]
Transformation = optax.GradientTransformation


def optimizer(config: Config) -> Transformation:
    """The full optimizer: direction, decay, momentum or averaging, learning rates, missing updates.

    Args:
      config: A file's config, with its per-step `learning_rates` added.

    Returns:
      The transformation; None leaves in its updates are missing gradients.
    """
    # The reference casts its rate to float32 even where parameters are float64.
    rates = jnp.asarray(np.float32(config["learning_rates"]), config.get("dtype", "float32"))

    def learning_rate(count: jax.Array) -> jax.Array:
        return rates[count]

    before, after = [], []
    if config["weight_decay"]:
        before, after = sj.decay_parts(
            config["weight_decay_kind"],
            config["weight_decay"],
            learning_rate,
            peak_lr=float(np.max(config["learning_rate"])),
        )
    momentum = config["momentum"]
    averaging = config["averaging"]
    if averaging:
        inner = optax.chain(*before, direction(config), optax.scale_by_learning_rate(learning_rate))
        return sj.accept_missing(averaged(inner, averaging, learning_rate, after))
    if momentum:
        after = [
            *after,
            sj.momentum(momentum["momentum"], momentum["dampening"], momentum["nesterov"]),
        ]
    return sj.accept_missing(
        optax.chain(*before, direction(config), *after, optax.scale_by_learning_rate(learning_rate))
    )


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
    if kind == "kronecker_root" and preconditioner["trace_scaling"] is None:
        return shampoo(config)
    if kind == "eigenbasis_adam":
        return soap(config)
    b3 = config["beta1_output"] if config["beta1"] else None
    inner = core(config, kind)
    graft = magnitude(config["graft"])
    return sj.blocked(
        optax.chain(
            sj.filter_gradient(config["beta1"], b3, bias_correction=config["bias_correction"]),
            inner if graft is None else sj.graft(graft, inner),
        ),
        canonical=False,
        **blocking(config),
    )


def shampoo(config: Config) -> Transformation:
    """Kronecker factors and cached roots."""
    return sj.scale_by_shampoo(
        config["beta1"],
        config["beta2"],
        b3=config["beta1_output"] if config["beta1"] else None,
        bias_correction=config["bias_correction"],
        canonical=False,
        exponents=exponents(config),
        weighted=not config["preconditioner"]["unweighted_update"],
        solver=solver(config),
        graft=magnitude(config["graft"]),
        **schedule(config),
        **blocking(config),
    )


def soap(config: Config) -> Transformation:
    """Adam in the eigenbasis, in the reference's form."""
    preconditioner = config["preconditioner"]
    override = preconditioner["exponents"]
    skipped = {int(o): dict.fromkeys(dims, 0.0) for o, dims in preconditioner["skip_basis"].items()}
    second = {int(order): float(e) for order, e in override.items()}
    return sj.scale_by_soap(
        config["beta1"],
        config["beta2"],
        b3=config["beta1_output"] if config["beta1"] else None,
        eps=config["epsilon"],
        exponent=lambda order: second.get(order, 0.5),
        bias_correction=config["bias_correction"],
        weighted=not preconditioner["unweighted_update"],
        canonical=False,
        exponents=skipped or None,
        basis=basis(preconditioner["solver"]),
        factor_eps=config["epsilon"] if preconditioner["rank"].get("before") else 0.0,
        refresh="before",
        skip_first=False,
        reorder=False,
        graft=magnitude(config["graft"]),
        **schedule(config),
        **blocking(config),
    )


def core(config: Config, kind: str) -> Transformation:
    """The part that turns a filtered gradient into a direction, for all other kinds."""
    preconditioner = config["preconditioner"]
    match kind:
        case "identity":
            return sj.on_updates(optax.identity())
        case "adam" | "rmsprop" | "adagrad" | "sgd":
            part = magnitude(preconditioner)
            assert part is not None
            return part
        case "sign":
            return sj.on_updates(optax.stateless(sign(preconditioner.get("scale"))))
        case "orthogonal":
            return sj.on_updates(optax.stateless(orthogonal(preconditioner)))
        case "kronecker_root" | "kronecker_eig" | "kl_root" | "kl_eig":
            return kronecker(config, kind)
    raise ValueError(f"preconditioner kind {kind!r} is not in the format.")


def kronecker(config: Config, kind: str) -> Transformation:
    """Statistics, roots and their application, from the single parts."""
    preconditioner = config["preconditioner"]
    override = sj.resolve_exponents(exponents(config))
    roots = sj.invert_roots(
        carried(config) if kind.endswith("eig") else solver(config),
        exponents=override,
        **schedule(config),
    )
    if preconditioner["trace_scaling"] is not None:
        scaling = sj.normalize_by_trace(preconditioner["trace_scaling"], config["epsilon"])
        roots = optax.chain(scaling, roots)
    statistics = dict(
        exponents=override,
        bias_correction=config["bias_correction"],
        weighted=not preconditioner["unweighted_update"],
    )
    if kind.startswith("kl"):
        return optax.chain(
            sj.accumulate_kl_factors(roots, config["beta2"], **statistics), sj.precondition()
        )
    return optax.chain(
        sj.accumulate_factors(config["beta2"], **statistics), roots, sj.precondition()
    )


def solver(config: Config) -> sj.Solver:
    """The inverse-root solver of a config."""
    chosen, rank = config["preconditioner"]["solver"], config["preconditioner"]["rank"]
    match chosen["kind"]:
        case "newton":
            # The reference accepts every finite root.
            return sj.CoupledNewton(
                config["epsilon"],
                chosen.get("max_iterations", 100),
                chosen.get("tolerance", 1e-6),
                max_residual=math.inf,
            )
        case "newton_high_order":
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


def carried(config: Config) -> sj.Solver:
    """The solver that keeps the eigendecomposition between refreshes."""
    method, rank = basis(config["preconditioner"]["solver"]), config["preconditioner"]["rank"]
    if rank["kind"] == "pseudo":
        return sj.CarriedBasis(method, rtol=rank["rtol"], atol=rank["atol"])
    return sj.CarriedBasis(method, eps=config["epsilon"], before=rank["before"])


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
        rows, columns = x.shape[1:]
        if chosen["kind"] == "svd":
            nuclear = preconditioner.get("nuclear_norm", False)
            x = orthogonalize.svd_orthogonalize(x, scale_by_nuclear_norm=nuclear)
        else:
            coefficients = chosen.get("coefficients", orthogonalize.QUINTIC)
            x = orthogonalize.newton_schulz(x, chosen.get("iterations", 5), coefficients, 1e-8)
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


def schedule(config: Config) -> Config:
    """Refresh interval and first refresh."""
    start = config["first_refresh_step"]
    return {"every": config["refresh_interval"], "start": None if start == -1 else start}


def blocking(config: Config) -> Config:
    """Block size and merging, no other reading; the config's `"inf"` is None here."""
    sizes = {"block_size": config["max_block_dim"], "merge": config["merge_target_order"]}
    finite = {name: None if value == "inf" else value for name, value in sizes.items()}
    return {**finite, "dimension_numbers": None}
