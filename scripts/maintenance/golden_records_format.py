"""What a recording of the newer records may say; anything else is refused by name."""

import math
from typing import Any

import numpy as np

from scripts.maintenance.golden_format import (
    ANY,
    BELOW_1,
    COUNT,
    FLAG,
    FROM_0,
    POSITIVE,
    UP_TO_1,
    Section,
    check_section,
    listed,
    number,
    one_of,
    refuse,
)

STEPS = number("an integer >= 0", lambda v: isinstance(v, int) and v >= 0)
DTYPE = one_of("float32", "float64")
COMMON = {
    "dtype": DTYPE,
    "floor": ANY,
    "method": ANY,
    "source": ANY,
    "zero_gradient_steps": ANY,
}
# The library's hyperball divides by norms as they are; this floor is met by nothing.
BALL = {"hyperball_eps": number("a number <= 1e-8", lambda v: 0 <= v <= 1e-8), "step0": ANY}
ITERATION = {
    "newton_schulz_dtype": one_of("float32", "float64", "bfloat16"),
    "ns_coefficients": listed(number("three numbers", math.isfinite)),
    "ns_steps": COUNT,
}
CONSTANTS = Section(
    {
        **dict.fromkeys(("ATTN_EARLY_TRUST_CAP", "ATTN_EARLY_TRUST_FLOOR"), UP_TO_1),
        **dict.fromkeys(("ATTN_TRUST_FLOOR_END_STEP", "ATTN_TRUST_FLOOR_FADE_END_STEP"), STEPS),
        **dict.fromkeys(("ATTN_TRUST_MIN_AGREE", "SOAP_BETA2", "_MU_MAX", "_MU_MIN"), BELOW_1),
        "ATTN_TRUST_MIN_GRAD_ALIGN": one_of(0.0, 0),
        "ATTN_TRUST_POWER": one_of(1.0, 1),
        "MU": ANY,  # the largest momentum once more
        **dict.fromkeys(("RADIAL_INWARD_SCALE", "RADIAL_OUTWARD_SCALE", "TARGET_UW"), FROM_0),
        "SOAP_DENOM_POWER": POSITIVE,
        "SOAP_PRECONDITION_FREQUENCY": COUNT,
        **dict.fromkeys(("_MU_COOLDOWN_STEPS", "_MU_WARMUP_STEPS"), COUNT),
    },
    {
        "CWD": FROM_0,
        "ROWFLOOR": FLAG,
        "ROWFLOOR_RHO": one_of(1.0, 1),
        **dict.fromkeys(("TAILEMA_END", "TAILEMA_START"), COUNT),
        "TAILEMA_LAMBDA": UP_TO_1,
        "TAILEMA_TAU": number("a number >= 1", lambda v: v >= 1),
    },
)
HYPER = Section(
    {
        "adamw_betas": listed(BELOW_1),
        **dict.fromkeys(("adamw_eps", "aux_eps", "lookahead"), FROM_0),
        **dict.fromkeys(("aux_b1", "b2_attn_proj_bias", "b2_gains", "b2_other"), BELOW_1),
        "lookahead_ema": BELOW_1,
        **dict.fromkeys(("lr_1d", "lr_embed", "lr_head"), POSITIVE),
        **dict.fromkeys(("prefill_steps", "rest_steps"), COUNT),
    }
)
SCHEDULE = Section(
    {
        "extra": ANY,  # constants once more
        **dict.fromkeys(("flat_adam", "flat_muon"), FROM_0),
        **dict.fromkeys(("lr_1d", "lr_embed", "lr_head", "lr_power", "muon_lr"), POSITIVE),
        **dict.fromkeys(("mu_cooldown", "mu_warmup", "schedule_steps", "train_steps"), COUNT),
        **dict.fromkeys(("trust_fade_end", "trust_floor_end"), STEPS),
    }
)
CONFIGS = {
    "pmuon": Section(
        {
            **COMMON,
            **ITERATION,
            **dict.fromkeys(("beta", "mu"), BELOW_1),
            "gamma": POSITIVE,
            **dict.fromkeys(("eps", "ns_eps", "learning_rate", "weight_decay"), FROM_0),
            "nesterov": one_of(True),
        }
    ),
    "muonh": Section(
        {
            **COMMON,
            **ITERATION,
            **BALL,
            "mu": BELOW_1,
            "nesterov": one_of(True),
            "ns_eps": one_of(1e-7),
        }
    ),
    "klsoap": Section(
        {
            **COMMON,
            **BALL,
            **dict.fromkeys(("beta1", "beta2", "shampoo_beta"), BELOW_1),
            "eps": FROM_0,
            **dict.fromkeys(("init_factor", "inverse_sqrt_clamp"), POSITIVE),
            "precondition_frequency": COUNT,
        }
    ),
    "soap_muon": Section(
        {
            **COMMON,
            "constants": ANY,
            "embed_dtype": one_of("float32", "float64", "bfloat16"),
            "hyper": ANY,
            "newton_schulz_dtype": ITERATION["newton_schulz_dtype"],
            "schedule": ANY,
            "soap_step0": ANY,
        }
    ),
}
# Settings that a file says twice.
TWICE = {
    "mu_cooldown": "_MU_COOLDOWN_STEPS",
    "mu_warmup": "_MU_WARMUP_STEPS",
    "trust_fade_end": "ATTN_TRUST_FLOOR_FADE_END_STEP",
    "trust_floor_end": "ATTN_TRUST_FLOOR_END_STEP",
}


def check(config: dict[str, Any], names: list[str], data: dict[str, np.ndarray]) -> None:
    """Raises ValueError naming what a file has that the format does not know."""
    check_section("", config, CONFIGS[config["method"]])
    if config["method"] == "soap_muon":
        sections = {"constants": CONSTANTS, "hyper": HYPER, "schedule": SCHEDULE}
        for key, section in sections.items():
            check_section(key, config[key], section)
        schedule, constants = config["schedule"], config["constants"]
        for one, other in TWICE.items():
            if schedule[one] != constants[other]:
                refuse(f"schedule.{one}", schedule[one], f"constants.{other}={constants[other]}")
    narrow = config.get("newton_schulz_dtype", config["dtype"])
    if narrow not in (config["dtype"], "bfloat16"):
        refuse("newton_schulz_dtype", narrow, f"dtype={config['dtype']!r} or 'bfloat16'")
    if not names or not data["grad_present"].all():
        raise ValueError(f"names={names}, or gradients that are missing: not in the format.")
    _check_arrays(config, names, data)


def _check_arrays(config: dict[str, Any], names: list[str], data: dict[str, np.ndarray]) -> None:
    steps, at = len(data[f"grad__{names[0]}"]), data["param_steps"]
    if not len(at) or at.min() < 0 or at.max() >= steps or len(data["lr"]) != steps:
        raise ValueError(f"param_steps={at}, {len(data['lr'])} rates of {steps} steps.")
    for n in names:
        shape = data[f"init__{n}"].shape
        shapes = {"grad": (steps, *shape), "param": (len(at), *shape), "spread": (steps,)}
        for key, wanted in shapes.items():
            found = data[f"{key}__{n}"].shape
            if found != wanted:
                raise ValueError(f"{key}__{n} has shape {found}: it must be {wanted}.")
        if not np.isfinite(data[f"spread__{n}"] + config["floor"][n]).all():
            raise ValueError(f"spread__{n} or floor of {n} is not finite: all would pass.")
