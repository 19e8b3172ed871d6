"""Replays recorded optimizers whose hyperparameters follow a width: arXiv:2512.05620.

A file holds a config with `method`, the shapes at the base width, initial parameters, gradients,
the schedule's factor at every step, the parameters after `param_steps` and their spread at every
step. A parameter agrees if its error is within `4 * spread + config.floor`. All multipliers are
those of `shampoo_jax.transfer_rules`; a learning rate that is not the recorded one is a miss. What
the library does not have of the authors' code is in `golden_transfer_parts`.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Collection
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
    FLAG,
    FROM_0,
    NULL,
    POSITIVE,
    Section,
    check_section,
    either,
    one_of,
    refuse,
)
from scripts.maintenance.golden_transfer_parts import grafted, muon, normalized, shampoo, soap

Array = jax.Array
Config = dict[str, Any]
Data = dict[str, np.ndarray]
Transformation = optax.GradientTransformation

SPECTRAL = "spectral-"
LABELS: dict[str, Config] = {
    "adam": {"method": "adam"},
    "muon": {"method": "muon"},
    "shampoo": {"method": "shampoo", "exponent": 0.25, "graft": None},
    "shampoo2": {"method": "shampoo", "exponent": 0.5, "graft": None},
    "grafted_shampoo": {"method": "shampoo", "exponent": 0.25, "graft": "adam"},
    "grafted_shampoo2": {"method": "shampoo", "exponent": 0.5, "graft": "adam"},
    "soap": {"method": "soap", "exponent": 0.25},
}
ON, DTYPE = one_of(True), one_of("float32", "float64")
OPTIONS = Section(
    {
        **dict.fromkeys(("B", "base_B", "block_size", "freq", "max_precond_dim"), COUNT),
        **dict.fromkeys(("b1", "b2"), BELOW_1),
        **dict.fromkeys(("adam_b1", "adam_b2"), either(NULL, BELOW_1)),
        **dict.fromkeys(("eps", "matrix_eps", "weight_decay"), FROM_0),
        **dict.fromkeys(("lr", "embed_lr_mult", "readout_lr_mult", "clip"), POSITIVE),
        **dict.fromkeys(("eigh", "rel_eps"), FLAG),
        **dict.fromkeys(("mup", "depth_mup", "scale_eps"), ON),
        **dict.fromkeys(("t1", "t2", "wd_half_life", "wdxD"), NULL),
        **dict.fromkeys(("decay_frac", "warmup_tokens"), ANY),  # of the recorded schedule
        "adam_eps": either(NULL, FROM_0),
        "eigh_warmup_steps": COUNT,
        "emb_norm": one_of("rms"),
        "hidden_norm": one_of("spec"),
        "readout_norm": one_of("spec"),
        "name": ANY,
        "schedule": one_of("linear"),
    }
)
CONFIG = Section(
    {
        "base_shapes": ANY,
        "batch_ratio": POSITIVE,
        "direct": ANY,
        "dtype": DTYPE,
        "floor": ANY,
        "labels": ANY,
        "learning_rates": ANY,
        "method": ANY,
        "opt": ANY,
        "optimizer": ANY,
        "orientation": one_of("(in, out) kernels"),
        "per_parameter": ANY,
        "shapes": ANY,
        "source": ANY,
        "zero_gradient_steps": ANY,
    },
)
DIRECT = Section(
    {
        **dict.fromkeys(("b1", "b2"), BELOW_1),
        **dict.fromkeys(("kl", "kr", "matrix_eps"), FROM_0),
        **dict.fromkeys(("eigh", "rel_eps"), FLAG),
        "freq": COUNT,
        "grafting": one_of(False),
    }
)
SPECTRUM = Section(
    {
        **dict.fromkeys(("method", "source", "floor", "zero_gradient_steps", "routing"), ANY),
        **dict.fromkeys(("power_iterations", "warmup_iterations", "warmup_steps"), COUNT),
        "eps": FROM_0,
    },
    {"dtype": DTYPE},
)
NORM_EPS = 1e-10  # of the spectral normalization in a chain


def holds_transfer(path: Path) -> bool:
    """Whether a file has this layout."""
    with np.load(path) as z:
        return "config" in z and json.loads(str(z["config"])).get("method") in METHODS


def error(path: Path, only: Collection[str] = ()) -> float:
    """The largest error over tolerance of a file; at most 1 is agreement.

    Args:
      path: npz file.
      only: Parameters that are replayed, for a test that wants to be short; none for all.

    Raises:
      ValueError: The file is not in the format.
    """
    with np.load(path) as z:
        data = dict(z)
    config, names = json.loads(str(data["config"])), json.loads(str(data["names"]))
    with jax.enable_x64(
        True
    ):  # parameters have the dtype of the run, roots are computed in float64
        return METHODS[config["method"]](config, names, data, only or names)


class Comparison(NamedTuple):
    """What is compared at which steps."""

    names: list[str]
    only: Collection[str]
    data: Data
    floor: dict[str, float]
    field: str

    def check(self) -> int:
        """The number of steps; ValueError where arrays do not belong together."""
        at, steps = self.data["param_steps"], len(self.data[f"grad__{self.names[0]}"])
        if not len(at) or at.min() < 0 or at.max() >= steps:
            raise ValueError(f"param_steps={at} of {steps} steps: nothing to compare.")
        for n in self.names:
            shape = self.data[f"grad__{n}"].shape[1:]
            shapes = {"grad": (steps, *shape), self.field: (len(at), *shape), "spread": (steps,)}
            for key, wanted in shapes.items():
                found = self.data[f"{key}__{n}"].shape
                if found != wanted:
                    raise ValueError(f"{key}__{n} has shape {found}: it must be {wanted}.")
            allowed = self.data[f"spread__{n}"] + self.floor[n]
            if not np.isfinite(allowed).all():
                raise ValueError(f"spread__{n} or floor of {n} is not finite: all would pass.")
        return steps

    def miss(self, t: int, ours: dict[str, Array]) -> float:
        """The largest error over tolerance after step t; 0 where nothing was recorded."""
        worst = 0.0
        for i in np.flatnonzero(self.data["param_steps"] == t):
            for n in self.only:
                theirs = self.data[f"{self.field}__{n}"][i]
                off = np.abs(np.asarray(ours[n], np.float64) - theirs).max()
                off /= 4 * self.data[f"spread__{n}"][t] + self.floor[n]
                worst = max(worst, float(np.nan_to_num(off, nan=math.inf)))
        return worst

    def gradients(self, t: int, dtype: str) -> dict[str, Array]:
        """Those of step t."""
        return {n: jnp.asarray(self.data[f"grad__{n}"][t], dtype) for n in self.names}


def trajectory(config: Config, names: list[str], data: Data, only: Collection[str]) -> float:
    """Error over tolerance of an optimizer's run, infinite where a learning rate is another one."""
    check(config, names, data)
    dtype, direct = config["dtype"], config["direct"]
    compared = Comparison(names, only, data, config["floor"], "update" if direct else "param")
    steps, rules = compared.check(), rules_of(config)
    if not direct and not rates_agree(config, rules):
        return math.inf
    inner = directions(config, rules, only)
    tx = inner if direct else optimizer(config, inner, data["lr"])
    params = {n: jnp.asarray(data[f"init__{n}"], dtype) for n in names}
    state, worst = tx.init(params), 0.0
    if config["optimizer"].startswith(SPECTRAL):
        state = started(state, data)
    step = jax.jit(tx.update, compiler_options={"xla_backend_optimization_level": 0})
    for t in range(steps):
        updates, state = step(compared.gradients(t, dtype), state, params)
        params = params if direct else optax.apply_updates(params, updates)
        worst = max(worst, compared.miss(t, updates if direct else params))
    return worst


def spectrum(config: Config, names: list[str], data: Data, only: Collection[str]) -> float:
    """Error over tolerance of recorded spectral normalization alone."""
    check_section("", config, SPECTRUM)
    routing, dtype = config["routing"], config.get("dtype", "float32")
    compared = Comparison(names, only, data, config["floor"], "update")
    for n in names:
        if routing.get(n) not in ("rms", "spectral"):
            refuse(f"routing.{n}", routing.get(n), "'rms' or 'spectral'")
    tx = normalized(
        lambda name: routing[name] == "rms",
        config["eps"],
        steps=config["power_iterations"],
        warmup=config["warmup_steps"],
        warmup_steps=config["warmup_iterations"],
    )
    steps, worst = compared.check(), 0.0
    state = started(tx.init(compared.gradients(0, dtype)), data)
    for t in range(steps):
        updates, state = tx.update(compared.gradients(t, dtype), state)
        worst = max(worst, compared.miss(t, updates))
    return worst


METHODS: dict[str, Callable[..., float]] = {
    "scaling_matrix_preconditioning": trajectory,
    "norm_by_spect": spectrum,
}


def check(config: Config, names: list[str], data: Data) -> None:
    """Raises ValueError naming what a file has that the format does not know."""
    check_section("", config, CONFIG)
    check_section("opt", config["opt"], OPTIONS)
    if config["direct"] is not None:
        check_section("direct", config["direct"], DIRECT)
    if not names or not data["grad_present"].all():
        raise ValueError(f"names={names}, or gradients that are missing: not in the format.")
    for n in names:
        if config["labels"].get(n) not in LABELS:
            refuse(f"labels.{n}", config["labels"].get(n), f"one of {', '.join(LABELS)}")
        if list(data[f"init__{n}"].shape) != config["shapes"][n]:
            refuse(f"shapes.{n}", config["shapes"][n], f"the shape of init__{n}")


def rules_of(config: Config) -> dict[str, sj.Multipliers]:
    """The library's multipliers of every parameter."""
    found = {}
    for label in dict.fromkeys(config["labels"].values()):
        options = dict(LABELS[label])
        options.pop("exponent", None)
        rules = sj.transfer_rules(
            shapes(config["base_shapes"]),
            shapes(config["shapes"]),
            depth=max(config["per_parameter"]["N"].values()),
            batch=config["batch_ratio"],
            exponents=exponents(config, label),
            blocking=blocking(config),
            normalized=config["optimizer"].startswith(SPECTRAL),
            preconditioned=lambda path, leaf: path[0].key.startswith("blocks"),
            others=options["method"],
            **options,
        )
        found |= {n: m for n, m in rules.multipliers.items() if config["labels"][n] == label}
    return found


def shapes(found: dict[str, list[int]]) -> dict[str, jax.ShapeDtypeStruct]:
    """Parameters without values."""
    return {n: jax.ShapeDtypeStruct(shape, np.float32) for n, shape in found.items()}


def rates_agree(config: Config, rules: dict[str, sj.Multipliers]) -> bool:
    """Whether the rules give the recorded learning rates, up to their float32."""
    opt = config["opt"]
    own = {"embed": opt["embed_lr_mult"], "readout": opt["readout_lr_mult"]}
    ours = {n: opt["lr"] * own.get(n, 1.0) * m.learning_rate for n, m in rules.items()}
    return all(math.isclose(ours[n], config["learning_rates"][n], rel_tol=1e-6) for n in ours)


def exponents(config: Config, label: str) -> Callable[[tuple[int, ...]], tuple[float, ...]]:
    """Of a label, 0 for sides that are too long."""
    exponent, limit = LABELS[label].get("exponent", 0.25), config["opt"]["max_precond_dim"]
    left, right = [(config["direct"] or {}).get(k, exponent) for k in ("kl", "kr")]
    return lambda shape: tuple(e * (d <= limit) for e, d in zip((left, right), shape, strict=True))


def blocking(config: Config) -> sj.Blocking:
    """Kernels as they are; sides without a factor are not cut."""
    size = config["opt"]["block_size"]
    return sj.Blocking(size, None, canonical=False, dimension_numbers=None, cut_all=False)


def optimizer(config: Config, inner: Transformation, lr: np.ndarray) -> Transformation:
    """Clip, direction, spectral normalization, learning rates, decay, schedule."""
    opt, rates, factors = config["opt"], config["learning_rates"], jnp.asarray(lr, config["dtype"])
    spectral = config["optimizer"].startswith(SPECTRAL)
    return optax.chain(
        optax.clip_by_global_norm(opt["clip"]),
        inner,
        normalized(lambda name: name == "embed", NORM_EPS) if spectral else optax.identity(),
        sj.scale_per_parameter(lambda path, leaf: rates[path[0].key]),
        optax.add_decayed_weights(opt["weight_decay"]),
        optax.scale_by_schedule(lambda count: -factors[count]),
    )


def directions(
    config: Config, rules: dict[str, sj.Multipliers], only: Collection[str]
) -> Transformation:
    """The direction of every parameter, one for all of the same label and multipliers."""
    keys = {n: f"{config['labels'][n]} {tuple(m)}" if n in only else "" for n, m in rules.items()}
    made = {keys[n]: direction(config, config["labels"][n], rules[n]) for n in only}
    return optax.partition({**made, "": optax.set_to_zero()}, keys)


def direction(config: Config, label: str, m: sj.Multipliers) -> Transformation:
    """The direction of a label."""
    opt = config["opt"] | (config["direct"] or {})
    if opt["adam_eps"] is None:
        opt |= {"adam_eps": opt["eps"]}
    frame = functools.partial(
        sj.blocked, blocking=blocking(config), exponents=exponents(config, label)
    )
    match LABELS[label]["method"]:
        case "adam":
            beside = config["optimizer"] != "adam"  # another one, with own decays if they are given
            b1, b2 = (beside and opt[f"adam_{b}"] or opt[b] for b in ("b1", "b2"))
            return optax.scale_by_adam(b1, b2, opt["adam_eps" if beside else "eps"] * m.eps)
        case "muon":
            return frame(muon(opt, m), blocking=dataclasses.replace(blocking(config), size=None))
        case "soap":
            return frame(soap(opt, m))
    whole = frame(shampoo(opt, m, config["batch_ratio"]))
    if LABELS[label]["graft"] is None:
        return whole
    lent = optax.scale_by_adam(opt["b1"], opt["b2"], opt["adam_eps"] * m.eps)
    return grafted(whole, lent, opt["adam_eps"] * m.graft_eps)


def started(state: Any, data: Data) -> Any:
    """A state with the recorded first vectors of the power iterations."""

    def recorded(path: Any, leaf: Array) -> Array:
        vectors = [k for k in path if isinstance(k, jax.tree_util.GetAttrKey)][-1:]
        if not vectors or vectors[0].name != "vectors":
            return leaf
        return jnp.asarray(data[f"v0__{path[-1].key}"][None], leaf.dtype)

    return jax.tree_util.tree_map_with_path(recorded, state)
