"""Replays recorded optimizers of the benchmark's newer records: PMuon, SOAP-Muon, KL-SOAP-H, MuonH.

A file holds a config with `method`, initial parameters, gradients, the parameters after
`param_steps` and their spread at every step. What runs are the entries of
`nanogpt.optimizers.directions` with the settings of the file, whole optimizers of
`nanogpt.optimizers.build`: weights, (out, in) in the recordings, are transposed to kernels. A value
agrees if its error is within `4 * spread + config.floor`. Rates, momenta and the look ahead have to
be the recorded ones to 12 digits, and what is computed in bfloat16 has to be bfloat16.
`schedules.json` is compared with the presets at every step that it has.
"""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shampoo_jax
from nanogpt.config.presets import preset
from nanogpt.config.run import (
    AuxiliaryConfig,
    Config,
    CooldownConfig,
    LookaheadConfig,
    ScheduleConfig,
    TailConfig,
)
from nanogpt.config.settings import MatrixConfig, MuonConfig, PMuonConfig, SoapMuonConfig
from nanogpt.optimizers import build, directions
from scripts.maintenance.golden_records_format import check
from scripts.maintenance.golden_records_schedules import TOLERANCE, schedules, schedules_error
from scripts.maintenance.golden_records_state import started

Array = jax.Array
Data = dict[str, np.ndarray]
Tree = dict[str, Any]
Transformation = optax.GradientTransformation

METHODS = ("pmuon", "soap_muon", "klsoap", "muonh")
CONSTANTS = {  # settings by the names that a file has for them
    "b1": "_MU_MAX",
    "b1_low": "_MU_MIN",
    "b1_warmup": "_MU_WARMUP_STEPS",
    "b1_cooldown": "_MU_COOLDOWN_STEPS",
    "b2": "SOAP_BETA2",
    "moment_exponent": "SOAP_DENOM_POWER",
    "every": "SOAP_PRECONDITION_FREQUENCY",
    "trust_least": "ATTN_TRUST_MIN_AGREE",
    "trust_floor": "ATTN_EARLY_TRUST_FLOOR",
    "trust_cap": "ATTN_EARLY_TRUST_CAP",
    "trust_steps": "ATTN_TRUST_FLOOR_END_STEP",
    "trust_end": "ATTN_TRUST_FLOOR_FADE_END_STEP",
    "length": "TARGET_UW",
    "by_row": "ROWFLOOR",
    "outward": "RADIAL_OUTWARD_SCALE",
    "inward": "RADIAL_INWARD_SCALE",
}


def holds_records(path: Path) -> bool:
    """Whether a file has this layout."""
    if path.suffix == ".json":
        return "records" in json.loads(path.read_text(encoding="utf-8"))
    with np.load(path) as z:
        return "config" in z and json.loads(str(z["config"])).get("method") in METHODS


def error(path: Path, only: Collection[str] = ()) -> float:
    """The largest error over tolerance of a file; at most 1 is agreement.

    Args:
      path: npz file, or the json file of schedules.
      only: Parameters that are replayed, for a test that wants to be short; none for all.

    Raises:
      ValueError: The file is not in the format.
    """
    if path.suffix == ".json":
        return schedules_error(path)
    with np.load(path) as z:
        data = dict(z)
    config, names = json.loads(str(data["config"])), json.loads(str(data["names"]))
    check(config, names, data)
    with jax.enable_x64(config["dtype"] == "float64"):
        return Replay(config, names, data, only or names).error()


class Replay:
    """A recording and the optimizer that it is of."""

    def __init__(self, config: dict[str, Any], names: list[str], data: Data, only: Collection[str]):
        self.config, self.names, self.data = config, only, data
        self.steps = len(data[f"grad__{names[0]}"])
        params = self.tree({n: data[f"init__{n}"] for n in only}, params=True)
        self.run: Config | None = None
        if config["method"] == "soap_muon":
            self.run = soap_muon(config, names)
            self.tx = build.build_optimizer(self.run, params)
        else:
            self.tx = directed(config, data)
        state = self.tx.init(params)
        paths = {"/".join(path_of(n)): n for n in only}
        self.first = params, started(state, params, config, paths, data)

    def dtype_of(self, name: str) -> str:
        """Of a parameter."""
        return self.config.get("embed_dtype" if "embed" in name else "dtype", self.config["dtype"])

    def tree(self, arrays: Mapping[str, np.ndarray], params: bool = False) -> Tree:
        """Parameters or gradients as the model has them."""
        tree: Tree = {}
        for name, x in arrays.items():
            *parents, last = path_of(name)
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            dtype = self.dtype_of(name) if params else self.config["dtype"]
            node[last] = jnp.asarray(x.T if is_kernel(name) else x).astype(dtype)
        return tree

    def error(self) -> float:
        """The largest error over tolerance; infinite where a schedule or a dtype is another one."""
        with jax.enable_x64(True):
            if not self.schedules_agree():
                return math.inf
        (params, state), worst = self.first, 0.0
        self.check_dtypes(self.config.get("newton_schulz_dtype") == "bfloat16")
        step = jax.jit(self.tx.update, compiler_options={"xla_backend_optimization_level": 0})
        for t in range(self.steps):
            weights = evaluated(state, params)
            worst = max(worst, self.miss("readout", t, max(t - 1, 0), self.steps, weights))
            worst = max(worst, self.miss("param_eval", t, max(t - 1, 0), self.steps, params))
            gradients = {n: self.data[f"grad__{n}"][t] for n in self.names}
            updates, state = step(self.tree(gradients), state, params)
            params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)
            after = stepped(state, params)
            for i in np.flatnonzero(self.data["param_steps"] == t):
                worst = max(worst, self.miss("param", i, t, len(self.data["param_steps"]), after))
            averages = tail_of(state)
            worst = max(worst, self.miss("tail_ema", t, t, self.steps, averages))
        return worst

    def miss(self, field: str, i: Any, t: int, entries: int, ours: Tree) -> float:
        """The largest error over tolerance of a recorded field; 0 where there is none."""
        worst = 0.0
        for n in self.names:
            if f"{field}__{n}" not in self.data:
                continue
            theirs, x = self.data[f"{field}__{n}"], at(ours, path_of(n))
            if x is None:  # what has no average is recorded as 0
                x = jnp.zeros_like(self.data[f"init__{n}"])
            x = np.asarray(x, np.float64)
            x = x.T if is_kernel(n) else x
            if theirs.shape != (entries, *x.shape):
                shape = (entries, *x.shape)
                raise ValueError(f"{field}__{n} has shape {theirs.shape}: it must be {shape}.")
            allowed = 4 * self.data[f"spread__{n}"][t] + self.config["floor"][n]
            off = np.abs(x - theirs[i]).max() / allowed
            worst = max(worst, float(np.nan_to_num(off, nan=math.inf)))
        return worst

    def check_dtypes(self, narrow: bool) -> None:
        """Raises ValueError where the arithmetic is not in the recorded precision.

        Args:
          narrow: Whether Newton-Schulz has to be in bfloat16.
        """
        params, state = self.first
        steps, _ = jax.eval_shape(self.tx.update, *self._arguments(state))
        wide = jnp.promote_types(self.config["dtype"], "float32")
        found = {x.dtype for x in jax.tree.leaves(steps)}
        if found != {wide}:
            raise ValueError(f"updates are in {found}: they must be in {wide}.")
        text = str(jax.make_jaxpr(self.tx.update)(*self._arguments(state)))
        if narrow != any("bf16" in line and "dot_general" in line for line in text.splitlines()):
            raise ValueError("Newton-Schulz is not in the precision of newton_schulz_dtype.")
        for n in self.names:
            if at(params, path_of(n)).dtype != self.dtype_of(n):
                raise ValueError(f"{n} is not in {self.dtype_of(n)}.")
        if {x.dtype.name for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16} and (
            self.config.get("embed_dtype") != "bfloat16"
        ):
            raise ValueError("some of the state is in bfloat16, and no parameter is.")

    def _arguments(self, state: Any) -> tuple[Any, Any, Any]:
        return self.tree({n: self.data[f"grad__{n}"][0] for n in self.names}), state, self.first[0]

    def schedules_agree(self) -> bool:
        """Whether rates, momentum and look ahead are the recorded ones at every step."""
        if self.run is None:  # the rates are those of the file
            return True
        steps, ours = np.arange(self.steps), schedules(self.run)
        lr = self.data["lr"].reshape(self.steps, -1)
        groups = ("matrices",) if lr.shape[1] == 1 else (*GROUPS, *("vectors",) * 3)
        if len(groups) != lr.shape[1]:
            raise ValueError(f"lr has {lr.shape[1]} groups: it must have 1 or 6.")
        pairs = [(ours[group](steps), lr[:, i]) for i, group in enumerate(groups)]
        for name in ("mu", "lookahead"):
            if name in self.data:
                pairs.append((np.broadcast_to(ours[name](steps), steps.shape), self.data[name]))
        return all(np.abs(np.asarray(own) - theirs).max() <= TOLERANCE for own, theirs in pairs)


GROUPS = ("embed", "head", "matrices")


def path_of(name: str) -> tuple[str, ...]:
    """The model's path of a recorded name.

    >>> path_of("blocks.0.attn.q.weight"), path_of("norm1.gains")
    (('blocks', '0', 'attn', 'q', 'kernel'), ('norm1', 'scale'))
    """
    if name == "embed.weight":
        return ("embed", "embedding")
    parts = name.split(".")
    if len(parts) == 1:
        return ("blocks", "0", "mlp", name, "kernel")
    last = {"weight": "kernel", "gains": "scale"}.get(parts[-1], parts[-1])
    parents = ["head"] if parts[:-1] == ["proj"] else parts[:-1]
    return (*parents, last)


def is_kernel(name: str) -> bool:
    """Whether a recorded parameter is a weight that is transposed here."""
    return path_of(name)[-1] == "kernel"


def at(tree: Any, path: tuple[str, ...]) -> Any:
    """A leaf, None where it is masked."""
    for key in path:
        if key not in tree:
            return None
        tree = tree[key]
    return tree if hasattr(tree, "dtype") else None


def evaluated(state: Any, params: Tree) -> Tree:
    """What is validated."""
    has = nodes(state, "evaluated")
    return shampoo_jax.eval_params(state, params) if has else params


def stepped(state: Any, params: Tree) -> Tree:
    """Parameters before they were moved ahead."""
    found = nodes(state, "last")
    return found[0].evaluated(params) if found else params


def tail_of(state: Any) -> Tree:
    """Averages of the last weights, which recordings have at 0 until they begin."""
    begun = lambda node: jax.tree.map(lambda x: x * node.begun, node.mean)  # noqa: E731
    return next((begun(node) for node in nodes(state, "begun")), {})


def nodes(state: Any, field: str) -> list[Any]:
    """Nodes of a state with some attribute."""
    return [
        x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, field)) if hasattr(x, field)
    ]


def directed(config: dict[str, Any], data: Data) -> Transformation:
    """The optimizer of a file with block matrices alone, and with rates instead of a schedule."""
    lr, every = jnp.asarray(data["lr"]), {"weight_decay": config.get("weight_decay", 0.0)}
    common: dict[str, Any] = {"learning_rate": float(lr[0]), **every}
    match config["method"]:
        case "pmuon":
            names = {"b1": "mu", "b2": "beta", "exponent": "gamma", "damping": "eps"}
            own = {ours: config[theirs] for ours, theirs in names.items()}
            matrices: Any = PMuonConfig(**common, **own, **iteration(config))
            matrices = dataclasses.replace(matrices, ns_eps=config["ns_eps"])
            direction = directions.pmuon(matrices)
        case "muonh":
            matrices = MuonConfig(**common, hyperball=True, b1=config["mu"], **iteration(config))
            direction = directions.muon_track3(matrices)
        case _:
            matrices = MatrixConfig(**common, hyperball=True)
            direction = shampoo_jax.scale_by_kl_soap(
                config["beta1"],
                config["beta2"],
                factor_b2=config["shampoo_beta"],
                eps=config["eps"],
                first_weight=1.0,
                first_eigenvalue=config["init_factor"],
                every=config["precondition_frequency"],
                max_scale=config["inverse_sqrt_clamp"],
            ).inner
    return shampoo_jax.guard(
        optax.chain(direction, *build.descent(matrices, lambda step: lr[step]))
    )


def iteration(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of a Newton-Schulz iteration; that of float64 files is in that of the parameters."""
    dtype = "bfloat16" if config["newton_schulz_dtype"] == "bfloat16" else "float32"
    coefficients = tuple(map(float, config.get("ns_coefficients", (2, -1.5, 0.5))))
    return {"ns_steps": config.get("ns_steps", 12), "ns_coeffs": coefficients, "ns_dtype": dtype}


def soap_muon(config: dict[str, Any], names: list[str]) -> Config:
    """The run of a file of the whole stack, or of its block matrices alone."""
    c, hyper, schedule = (config[key] for key in ("constants", "hyper", "schedule"))
    end = schedule["schedule_steps"]

    def fall(flat: float) -> ScheduleConfig:
        return ScheduleConfig(end, cooldown=(end - flat) / end, power=schedule["lr_power"])

    own = {ours: c[theirs] for ours, theirs in CONSTANTS.items() if theirs in c}
    matrices = SoapMuonConfig(
        schedule["muon_lr"], c.get("CWD", 0.0), b1_end=schedule["train_steps"], **own,
        **iteration(config),
    )  # fmt: skip
    b1, b2 = hyper["adamw_betas"]
    auxiliary = AuxiliaryConfig(
        schedule["lr_embed"],
        schedule["lr_head"],
        schedule["lr_1d"],
        b1=b1,
        b2=b2,
        eps=hyper["adamw_eps"],
        vector_b2=tuple(hyper[f"b2_{kind}"] for kind in ("gains", "attn_proj_bias", "other")),
        vector_b1=hyper["aux_b1"],
        vector_eps=hyper["aux_eps"],
        vector_bias_correction=False,
    )
    tail = None
    if "TAILEMA_START" in c:
        found = {ours: c[f"TAILEMA_{ours.upper()}"] for ours in ("start", "tau", "end")}
        tail = TailConfig(share=c["TAILEMA_LAMBDA"], **found)
    # The look ahead follows the rate of the first group.
    first = fall(schedule["flat_adam" if "embed.weight" in names else "flat_muon"])
    decay, matrices_fall = hyper["lookahead_ema"], fall(schedule["flat_muon"])
    return dataclasses.replace(
        preset("track3", "soap_muon"),
        matrices=matrices,
        auxiliary=auxiliary,
        schedule=first,
        matrices_cooldown=CooldownConfig(
            cooldown=matrices_fall.cooldown, power=matrices_fall.power
        ),
        lookahead=LookaheadConfig(
            hyper["lookahead"], hyper["prefill_steps"], hyper["rest_steps"], decay
        ),
        tail=tail,
    )
