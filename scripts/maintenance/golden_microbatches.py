"""Replays recorded optimizers whose statistics are of microbatches, one trajectory a mode.

A file holds a config with `method` and `modes`, initial parameters, `micro__NAME`
`[T, 2m, *shape]`, the gradients of two groups of m microbatches, for Sophia `micro_gnb__NAME` of
sampled labels, and by mode the parameters after `param_steps` and their spread at every step. A
parameter agrees if its error is within `4 * spread + config.floor`.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shampoo_jax as sj
from scripts.maintenance.golden_format import (
    ANY,
    BELOW_1,
    COUNT,
    FROM_0,
    POSITIVE,
    Section,
    check_section,
    listed,
    one_of,
    refuse,
)

Array = jax.Array
Config = dict[str, Any]
Tree = dict[str, Array]
Transformation = optax.GradientTransformationExtraArgs

COMMON = {
    "method": ANY,
    "modes": ANY,
    "dtype": one_of("float32", "float64"),
    "source": ANY,
    "floor": ANY,
    "microbatches_per_group": COUNT,
    "zero_gradient_steps": ANY,
    "beta1": BELOW_1,
    "beta2": BELOW_1,
    "weight_decay": FROM_0,
    "grad_clip": POSITIVE,
}
BASIC = ("std", "cf", "inv", "full", "full_clip")
FORMATS = {
    "fastino_shampoo": (
        COMMON
        | {"adamw_betas": listed(BELOW_1), "adamw_eps": POSITIVE}
        | {"damping": POSITIVE, "max_dim": COUNT, "root_freq": COUNT},
        BASIC,
    ),
    "fastino_adamw": (
        COMMON | {"eps": POSITIVE, "support_clip_eps": POSITIVE, "support_clip_tau": POSITIVE},
        (*BASIC, "cf_half", "cf_adaptive", "full_support", "full_pre_ema")
        + ("loo", "loo_jensen", "twofold"),
    ),
    "fastino_sophia": (
        COMMON
        | {"eps": POSITIVE, "bs": POSITIVE, "rho": POSITIVE, "hessian_freq": COUNT}
        | {"update_clip": POSITIVE},
        (*BASIC, "full_pre_ema"),
    ),
}
# The gradient is the mean over the first group, statistics are of the second; else all are of all.
CROSS_FITTED = ("cf", "full")


class Names(NamedTuple):
    """Of trees in `further`: what second moments square, and what corrects; None for neither."""

    squared: str | None
    noisy: str | None


def holds_microbatches(path: Path) -> bool:
    """Whether a file has this layout."""
    with np.load(path) as z:
        return "config" in z and json.loads(str(z["config"])).get("method") in FORMATS


def errors(path: Path) -> dict[str, float]:
    """The largest error over tolerance of every mode of a file.

    Raises:
      ValueError: The file is not in the format.
    """
    with np.load(path) as z:
        data = dict(z)
    config = json.loads(str(data["config"]))
    check(config, data)
    return {mode: error(config, data, mode) for mode in config["modes"]}


def check(config: Config, data: dict[str, np.ndarray]) -> None:
    """Raises ValueError naming what a file has, or has not, that the format does not know."""
    keys, modes = FORMATS[config["method"]]
    check_section("", config, Section(keys))
    names, steps = json.loads(str(data["names"])), len(data["lr"])
    at, k = data["param_steps"], 2 * config["microbatches_per_group"]
    if not config["modes"] or not names or not len(at) or not data["grad_present"].all():
        raise ValueError(f"modes={config['modes']}, names={names}: nothing to compare, or missing.")
    for mode in config["modes"]:
        if mode not in modes:
            refuse("modes", mode, ", ".join(modes))
    shapes = {}
    for n in names:
        shape = data[f"init__{n}"].shape
        shapes |= {key: (steps, k, *shape) for key in _micro(config, n)}
        for mode in config["modes"]:
            shapes |= {f"{mode}/param__{n}": (len(at), *shape), f"{mode}/spread__{n}": (steps,)}
    for key, shape in shapes.items():
        if data[key].shape != shape:
            raise ValueError(f"{key} has shape {data[key].shape}: it must be {shape}.")
        if not np.isfinite(data[key]).all():
            raise ValueError(f"{key} is not finite: every error would pass.")


def _micro(config: Config, name: str) -> list[str]:
    sampled = [f"micro_gnb__{name}"] if config["method"] == "fastino_sophia" else []
    return [f"micro__{name}", *sampled]


def error(config: Config, data: dict[str, np.ndarray], mode: str) -> float:
    """The largest error over tolerance of one mode."""
    names = json.loads(str(data["names"]))
    with jax.enable_x64(config["dtype"] == "float64"):
        tx = optimizer(config, mode, data["lr"])
        params = {n: jnp.asarray(data[f"init__{n}"], config["dtype"]) for n in names}

        def advance(params: Tree, state: Any, gradients: Tree, further: Any) -> tuple[Tree, Any]:
            updates, state = tx.update(gradients, state, params, further=further)
            return optax.apply_updates(params, updates), state

        step = jax.jit(advance, compiler_options={"xla_backend_optimization_level": 0})
        state, worst, at = jax.jit(tx.init)(params), 0.0, data["param_steps"].tolist()
        for t in range(max(at) + 1):
            gradients, further = inputs(config, data, mode, names, t)
            params, state = step(params, state, gradients, further)
            for n in names if t in at else ():
                theirs = data[f"{mode}/param__{n}"][at.index(t)]
                limit = 4 * data[f"{mode}/spread__{n}"][t] + config["floor"][n]
                miss = np.abs(np.asarray(params[n], np.float64) - theirs).max(initial=0) / limit
                worst = max(worst, float(np.nan_to_num(miss, nan=np.inf)))
        return worst


def inputs(
    config: Config, data: dict[str, np.ndarray], mode: str, names: list[str], t: int
) -> tuple[Tree, dict[str, Tree]]:
    """Gradients of a step, and the further trees that the parts of a mode read."""
    m = config["microbatches_per_group"]
    crossed = mode.split("_")[0] in CROSS_FITTED

    def of(prefix: str, some: slice) -> Tree:
        return {n: jnp.asarray(data[f"{prefix}__{n}"][t][some], config["dtype"]) for n in names}

    first, second = (slice(m), slice(m, None)) if crossed else (slice(None), slice(None))
    gradients = jax.tree.map(lambda x: x.mean(0), of("micro", first))
    own = jax.tree.map(lambda g: g[None], gradients)  # in front of a clip, which only momentum sees
    further = {"own": own, "micro": of("micro", second)}
    if config["method"] == "fastino_sophia":
        sampled = of("micro_gnb", second)
        mean = jax.tree.map(lambda x: x.mean(0, keepdims=True), sampled)
        further = {"own": mean, "micro": sampled}
    return gradients, further


def optimizer(config: Config, mode: str, rates: np.ndarray) -> Transformation:
    """The recorded optimizer of a mode, out of what the library exports."""
    clipped, mode = mode.endswith("_clip"), mode.removesuffix("_clip")
    names = Names(
        "micro" if mode.split("_")[0] in CROSS_FITTED else "own",
        "micro" if mode.split("_")[0] in ("inv", "full") else None,
    )
    direction = DIRECTIONS[config["method"]](config, mode, names)
    schedule = jnp.asarray(rates, config["dtype"])
    return optax.chain(
        clip_to(config["grad_clip"]) if clipped else optax.identity(),
        direction,
        optax.add_decayed_weights(config["weight_decay"]),
        optax.scale_by_learning_rate(lambda count: schedule[count]),
    )


def clip_to(most: float) -> optax.GradientTransformation:
    """Clips to a global norm as torch does: with 1e-6 in the denominator."""

    def clip(updates: Any, params: Any) -> Any:
        factor = jnp.minimum(1.0, most / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda u: u * factor, updates)

    return optax.stateless(clip)


def whole(*parts: optax.GradientTransformation) -> Transformation:
    """Parts on parameters that are not cut."""
    return sj.blocked(optax.chain(*parts), blocking=sj.Blocking(None, None, canonical=False))


def shampoo(config: Config, mode: str, names: Names) -> Transformation:
    """Shampoo on matrices of at most `max_dim`, AdamW on the rest."""
    shifted = sj.ShiftedEigh(config["damping"])
    solver = sj.Debiased(shifted, names.noisy) if names.noisy else shifted
    squared = names.squared if mode in CROSS_FITTED else None
    factors = sj.accumulate_factors(config["beta2"], bias_correction=False, microbatches=squared)
    matrices = whole(
        sj.filter_gradient(config["beta1"], bias_correction=False),
        now_and_then(optax.chain(factors, sj.invert_roots(solver)), config["root_freq"]),
        sj.precondition(),
    )
    b1, b2 = config["adamw_betas"]
    second = sj.scale_by_second_moment(b2, config["adamw_eps"], microbatches="own")
    others = whole(sj.filter_gradient(b1), second)

    def labels(params: Tree) -> dict[str, str]:
        small = {n: p.ndim == 2 and max(p.shape) <= config["max_dim"] for n, p in params.items()}
        return {n: "matrices" if fits else "others" for n, fits in small.items()}

    return optax.partition({"matrices": matrices, "others": others}, labels)


class NowAndThenState(NamedTuple):
    """State of `now_and_then`."""

    count: Array
    inner: Any
    matrices: Any


def now_and_then(inner: optax.GradientTransformation, every: int) -> Transformation:
    """Runs statistics and roots at steps 1, 1 + every, ... alone; in between the roots stay.

    The library's factors take in every gradient.
    """
    tx = optax.with_extra_args_support(inner)

    def init(stacks: Any) -> NowAndThenState:
        factors = {
            key: tuple(jnp.zeros((len(b.update), d, d), b.update.dtype) for d in b.shape)
            for key, b in stacks.items()
        }
        return NowAndThenState(jnp.zeros([], jnp.int32), tx.init(stacks), factors)

    def update(stacks: Any, state: NowAndThenState, params: Any = None, **extra: Any) -> Any:
        def run(old: NowAndThenState) -> NowAndThenState:
            new, kept = tx.update(stacks, old.inner, params, **extra)
            return old._replace(inner=kept, matrices={key: b.matrices for key, b in new.items()})

        state = jax.lax.cond(state.count % every == 0, run, lambda old: old, state)
        rooted = {
            key: dataclasses.replace(b, matrices=state.matrices[key]) for key, b in stacks.items()
        }
        return rooted, state._replace(count=state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def adamw(config: Config, mode: str, names: Names) -> Transformation:
    """AdamW's direction; modes of the source's experiments are made of parts of this file."""
    b1, b2, eps = (config[key] for key in ("beta1", "beta2", "eps"))
    match mode:
        case "loo" | "loo_jensen":
            debias = mode == "loo_jensen"
            return whole(sj.cross_fitted_adam(b1, b2, eps, debias=debias, microbatches="micro"))
        case "twofold":
            form: Any = {"squares": "mean_of", "debias": True, "microbatches": "micro"}
            return whole(sj.cross_fitted_adam(b1, b2, eps, folds=2, **form))
    second = sj.scale_by_second_moment(b2, eps, microbatches=names.squared, debias=names.noisy)
    first = [sj.filter_gradient(b1)]
    match mode:
        case "cf_half" | "cf_adaptive":
            first.append(stateless(lambda b: mixed(b, mode == "cf_adaptive")))
        case "full_support":
            tau, tiny = config["support_clip_tau"], config["support_clip_eps"]
            first.append(stateless(lambda b: supported(b, tau, tiny)))
        case "full_pre_ema":
            plain = sj.scale_by_second_moment(b2, eps, microbatches=names.squared)
            second = before_average(plain, b2, eps)
    return whole(*first, second)


def stateless(f: Callable[[sj.Blocks], sj.Blocks]) -> optax.GradientTransformation:
    """A part without state."""
    return optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda stacks, state, params=None: ({key: f(b) for key, b in stacks.items()}, state),
    )


def mixed(b: sj.Blocks, adaptive: bool) -> sj.Blocks:
    """Statistics half of the mean gradient, half of microbatches, or by the cosine of the two."""
    g, x = b.gradient[:, None], b.further["micro"]
    share: Any = 0.5
    if adaptive:
        axes = tuple(range(1, b.gradient.ndim))
        a, c = b.gradient**2, jnp.mean(x**2, 1)
        dot, size = jnp.sum(a * c, axes), jnp.sum(a * a, axes) * jnp.sum(c * c, axes)
        share = jnp.where(size > 0, dot / jnp.sqrt(jnp.where(size > 0, size, 1)), 0)
        share = share.reshape(-1, *[1] * (x.ndim - 1))
    both = jnp.concatenate(
        [x * jnp.sqrt(2 * share), jnp.broadcast_to(g, x.shape) * jnp.sqrt(2 * (1 - share))], 1
    )
    return dataclasses.replace(b, further={**b.further, "micro": both})


def supported(b: sj.Blocks, tau: float, tiny: float) -> sj.Blocks:
    """Updates held back where the mean gradient is larger than its microbatches support."""
    squares = jnp.mean(b.further["micro"] ** 2, 1)
    ratio = jnp.sqrt(tau * (squares + tiny) / (b.gradient**2 + tiny))
    return dataclasses.replace(b, update=b.update * jnp.minimum(1.0, ratio))


def before_average(
    second: optax.GradientTransformation, b2: float, eps: float
) -> optax.GradientTransformation:
    """A second moment corrected by the variance of what it takes in, as the source has it.

    Its factor 3/8 should be 1/8: half of the second derivative of `1 / (sqrt(v) + eps)` is
    `1 / (4 v p^3) + 1 / (8 v^1.5 p^2)`.
    """

    def init(stacks: Any) -> Any:
        return second.init(stacks)

    def update(stacks: Any, state: Any, params: Any = None) -> Any:
        ones = {
            key: dataclasses.replace(b, update=jnp.ones_like(b.update)) for key, b in stacks.items()
        }
        inverse, state = second.update(ones, state, params)
        scale = (1 - b2) / (1 - b2 ** state.count.astype(float))

        def one(b: sj.Blocks, inverse: Array) -> sj.Blocks:
            root = 1 / inverse
            v, m = (root - eps) ** 2, b.further["micro"].shape[1]
            variance = jnp.var(b.further["micro"] ** 2, 1, ddof=1) / m
            known = v > 0
            v = jnp.where(known, v, 1.0)
            less = scale**2 * variance * (1 / (4 * v * root**3) + 3 / (8 * v**1.5 * root**2))
            factor = jnp.maximum(inverse - jnp.where(known, less, 0.0), 0.0)
            return dataclasses.replace(b, update=b.update * factor)

        return {key: one(b, inverse[key].update) for key, b in stacks.items()}, state

    return optax.GradientTransformation(init, update)


def sophia(config: Config, mode: str, names: Names) -> Transformation:
    """Sophia's direction; its `full_pre_ema` is its `full`, whose denominator is linear."""
    size = config["rho"] * config["bs"]
    diagonal = sj.scale_by_second_moment(
        config["beta2"],
        config["eps"] / size,
        exponent=1.0,
        bias_correction=False,
        microbatches=names.squared,
        debias=names.noisy,
    )
    return whole(
        sj.filter_gradient(config["beta1"], bias_correction=False),
        sj.cached_scale(diagonal, config["hessian_freq"]),
        sj.on_updates(optax.chain(optax.scale(1 / size), optax.clip(config["update_clip"]))),
    )


DIRECTIONS: dict[str, Callable[[Config, str, Names], Transformation]] = {
    "fastino_shampoo": shampoo,
    "fastino_adamw": adamw,
    "fastino_sophia": sophia,
}
