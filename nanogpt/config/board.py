"""The scaled-down board: the registry's optimizers at one small size, for a CPU.

What depends on size or steps is not as published: rates, decay, and how often bases are refreshed.
Cutoffs are relative, since the published cutoff at 0 keeps rounding noise.
"""

from nanogpt.config.recipes import NS12, Recipe
from nanogpt.config.run import AuxiliaryConfig, CooldownConfig, Init, ScheduleConfig
from nanogpt.config.settings import (
    AdamWConfig,
    KLConfig,
    LionConfig,
    MatrixConfig,
    MuonConfig,
    PsgdConfig,
    ShampooConfig,
    SoapConfig,
    SophiaConfig,
)

STEPS = 300
TOKENS = 8 * 128  # in a batch
AUXILIARY = AuxiliaryConfig(0.3, 0.01, 0.01)
PLAIN = ScheduleConfig(STEPS)
WARM = ScheduleConfig(STEPS, warmup_steps=20)
HELD, LINE = ScheduleConfig(STEPS, cooldown=0.4), CooldownConfig()


def _plain(optimizer: str, matrices: MatrixConfig, schedule: ScheduleConfig = PLAIN) -> Recipe:
    return Recipe(optimizer, matrices, AUXILIARY, schedule)


def _held(
    optimizer: str,
    matrices: MatrixConfig,
    schedule: ScheduleConfig = HELD,
    cooldown: CooldownConfig = LINE,
    init: Init = "record27",
) -> Recipe:
    """On a hyperball: no matrix starts at 0, and the matrices' rate falls from the first step."""
    return Recipe(optimizer, matrices, AUXILIARY, schedule, cooldown, init)


BOARD: dict[str, Recipe] = {
    "adamw": _plain("adamw", AdamWConfig(0.004, weight_decay=0.1), WARM),
    "adamh": _held("adamw", AdamWConfig(0.02, 0.0, hyperball=True)),
    "muon": _plain("muon", MuonConfig(0.04, weight_decay=0.025)),
    "muon_track3": _plain("muon_track3", MuonConfig(0.02, weight_decay=0.025, **NS12)),
    "muonh": _held("muon_track3", MuonConfig(0.02, 0.0, **NS12, hyperball=True)),
    "shampoo": _plain("shampoo", ShampooConfig(0.01, weight_decay=0.1)),
    "shampoo_record21": _plain(
        "shampoo",
        ShampooConfig(0.005, 0.2, b2=0.95, cutoff="shift", every=5, graft_b2=0.95, graft_eps=1e-10),
    ),
    "shampoo_third": _plain(
        "shampoo", ShampooConfig(0.02, 0.025, b1=0.95, exponent=1 / 3, size="rows")
    ),
    "soap": _plain("soap", SoapConfig(0.005, weight_decay=0.1, every=5)),
    "soap_h": _held(
        "soap",
        SoapConfig(0.02, 0.0, b2=0.9, every=1, form="record27", hyperball=True),
        cooldown=CooldownConfig(power=1.25, horizon=1.024),
    ),
    "kl_shampoo": _plain("kl_shampoo", KLConfig(0.005, weight_decay=0.1, every=5, tokens=TOKENS)),
    "kl_soap_h": _held(
        "kl_soap",
        KLConfig(
            0.02, 0.0, b1=0.95, b2=0.9, every=1, max_scale=4000.0, first_weight=1.0, hyperball=True
        ),
    ),
    "psgd": _held(
        "psgd",
        PsgdConfig(0.02, 0.0, hyperball=True),
        ScheduleConfig(STEPS, cooldown=0.5, final=0.1),
        init="record33",
    ),
    "lion": _plain("lion", LionConfig(0.001, weight_decay=0.3), WARM),
    "sophia": _plain("sophia", SophiaConfig(0.002, weight_decay=0.1), WARM),
}
