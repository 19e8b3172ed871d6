"""Recorded multipliers of hyperparameters that follow width and depth: a file of scenarios in JSON.

A scenario names a setting, every parameter's shape and that at the base, and what the source's
running code took: learning rates by optimizer and parameter, eps over the nominal one, the factor
of residual branches; and, of all scenarios together, decay by width.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import shampoo_jax
from shampoo_jax import Multipliers, transfer_rules

# The source's optimizers in the words of this package.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": dict(method="adam"),
    "muon": dict(method="muon"),
    "muon_adam": dict(method="muon"),
    "shampoo": dict(method="shampoo", exponent=0.25, graft=None),
    "shampoo2": dict(method="shampoo", exponent=0.5, graft=None),
    "grafted_shampoo": dict(method="shampoo", exponent=0.25),
    "grafted_shampoo2": dict(method="shampoo", exponent=0.5),
    "grafted_shampoo2_adam": dict(method="shampoo", exponent=0.5),
    "soap": dict(method="soap", exponent=0.25),
    "sgd": dict(method="sgd"),
    "spectral-soap": dict(method="soap", exponent=0.25, normalized=True),
    "spectral-muon": dict(method="muon", normalized=True),
}
# Of every recorded kind of eps the optimizer, and our multiplier; `batch` is the ratio of batches.
EPS: dict[str, tuple[str, Callable[[Multipliers, float], float]]] = {
    "adam": ("adam", lambda m, batch: m.eps),
    "muon": ("muon", lambda m, batch: m.eps),
    "soap_adam_eps": ("soap", lambda m, batch: m.eps),
    "grafted_shampoo_graft_eps": ("grafted_shampoo", lambda m, batch: m.graft_eps),
    "grafted_shampoo2_graft_eps": ("grafted_shampoo2", lambda m, batch: m.graft_eps),
    "shampoo_matrix_eps_initial": ("shampoo", lambda m, batch: m.damping),
    "shampoo_matrix_eps_ridge": ("grafted_shampoo", lambda m, batch: m.damping),
    "shampoo_matrix_eps_initial_when_relative": ("shampoo2", lambda m, batch: m.damping * batch),
}
# Relative; decay is recorded to four digits.
TOLERANCES = {"learning rates": 1e-6, "eps": 1e-8, "residual branches": 1e-12, "decay": 1e-12}
Pairs = Iterator[tuple[float, float]]


def errors(path: Path) -> dict[str, float]:
    """The largest relative error over tolerance, by kind.

    Raises:
      ValueError: a file of another layout, or one that names what we do not have.
    """
    recorded = json.loads(path.read_text())
    if not recorded.get("scenarios") or not recorded.get("weight_decay"):
        raise ValueError("no scenarios and weight_decay: this is no file of multipliers.")
    every = list(recorded["scenarios"].values())
    found = {
        "learning rates": [pair for s in every for pair in _rates(s)],
        "eps": [pair for s in every for pair in _eps(s)],
        "residual branches": [
            (rules_of(s, "adam").residual, s["residual_branch_multiplier"]) for s in every
        ],
        "decay": list(_decay(recorded["weight_decay"])),
    }
    return {kind: _worst(pairs) / TOLERANCES[kind] for kind, pairs in found.items()}


def rules_of(scenario: Mapping[str, Any], optimizer: str, *, cut: bool = True) -> Any:
    """Our rules for a recorded optimizer, with its blocks or as if it had none."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {optimizer!r} is unknown: we have {', '.join(OPTIMIZERS)}.")
    options, setting = dict(OPTIMIZERS[optimizer]), scenario["setting"]
    exponent = options.pop("exponent", 0.25)
    limit = setting["max_precond_dim"]
    base, wide = (
        {n: jax.ShapeDtypeStruct(p[key], jnp.float32) for n, p in scenario["parameters"].items()}
        for key in ("base_shape", "shape")
    )
    return transfer_rules(
        base,
        wide,
        depth=setting["N"] / setting["base_N"],
        batch=setting["B"] / setting["base_B"],
        exponents=lambda shape: tuple(exponent * (d <= limit) for d in shape),
        blocking=shampoo_jax.Blocking(setting["block_size"]) if cut else None,
        preconditioned=lambda path, leaf: path[0].key.startswith("blocks"),
        others="adam" if optimizer.endswith("_adam") else options["method"],
        **options,
    )


def _rates(scenario: Mapping[str, Any]) -> Pairs:
    """Ours and theirs, those of the main branch."""
    for optimizer, recorded in scenario["learning_rate"].items():
        found = rules_of(scenario, optimizer).multipliers
        for parameter, values in recorded.items():
            yield found[parameter].learning_rate, values["lr_main_branch"]


def _eps(scenario: Mapping[str, Any]) -> Pairs:
    batch = scenario["setting"]["B"] / scenario["setting"]["base_B"]
    for key, recorded in scenario["eps"].items():
        if key not in EPS:
            raise ValueError(f"eps of {key!r} is unknown: we have {', '.join(EPS)}.")
        optimizer, ours = EPS[key]
        found = rules_of(scenario, optimizer).multipliers
        for parameter, sides in recorded.items():
            for side in sides if isinstance(sides, list) else [sides]:
                if side is not None:
                    yield ours(found[parameter], batch), side


def _decay(recorded: Mapping[str, float]) -> Pairs:
    """Decay by width, "width:product" at the base width 512."""
    for key, value in recorded.items():
        width, product = key.split(":")
        base, wide = ({"w": jnp.zeros((d, d))} for d in (512, int(width)))
        decay = transfer_rules(base, wide, "adam").multipliers["w"].decay
        yield float(f"{float(product) / 512 * decay:.4g}"), value


def _worst(pairs: list[tuple[float, float]]) -> float:
    """Largest relative error, inf where there is nothing to compare or a number is none."""
    ours, theirs = np.array(pairs).reshape(-1, 2).T
    if not len(ours):
        return float("inf")
    return float(np.nan_to_num(np.max(np.abs(ours - theirs) / np.abs(theirs)), nan=np.inf))
