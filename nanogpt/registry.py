"""The published optimizers of the board: settings as published, their source, what they reached.

Source, where nothing else is said: KellerJordan/modded-nanogpt, records/track_3_optimization; "#N"
is the N-th result of its table. Nothing here has been run at full size with this code.
"""

import dataclasses

from nanogpt.config import AuxiliaryConfig, CooldownConfig, ScheduleConfig
from nanogpt.recipes import AUXILIARY_OLD, AUXILIARY_TUNED, NS5_VARYING, NS12, Published, Recipe
from nanogpt.settings import (
    AdamWConfig,
    KLConfig,
    LionConfig,
    MuonConfig,
    PsgdConfig,
    ShampooConfig,
    SoapConfig,
    SophiaConfig,
)

PUBLISHED: dict[str, Published] = {
    "adamw": Published(
        Recipe(
            "adamw",
            AdamWConfig(0.001, weight_decay=1.0, b1=0.9, b2=0.9, eps=1e-8),
            dataclasses.replace(AUXILIARY_TUNED, weight_decay=0.002),
            ScheduleConfig(4950, warmup_steps=100, warmup_from=1e-7),
        ),
        "pull request 353",
        4950,
        3.277604,
        10,
    ),
    "adamw_record2": Published(
        Recipe(
            "adamw",
            AdamWConfig(0.0015, weight_decay=0.1, b1=0.9, b2=0.95, eps=1e-10),
            AUXILIARY_OLD,
            ScheduleConfig(5625, warmup_steps=250),
            init="record2",
        ),
        "#2",
        5625,
        3.27903,
        1,
        note="The script's norms were computed in float32 throughout.",
    ),
    "adamh": Published(
        Recipe(
            "adamw",
            AdamWConfig(0.018, weight_decay=0.0, hyperball=True),
            AUXILIARY_OLD,
            ScheduleConfig(4875, warmup_steps=250),
            init="record27",
        ),
        "#4",
        4875,
        3.27414,
        5,
        note="Initial weights and cooldown are assumed: those of #27 and of #2.",
    ),
    "muon": Published(
        Recipe("muon", MuonConfig(0.035, weight_decay=0.025), AUXILIARY_OLD, ScheduleConfig(3350)),
        "Optax's defaults with the rates of #12",
        note="Never published; the benchmark's own Muon is muon_track3.",
    ),
    "muon_track3": Published(
        Recipe(
            "muon_track3",
            MuonConfig(0.025, weight_decay=0.05, ns_dtype="bfloat16", **NS12),
            AUXILIARY_TUNED,
            ScheduleConfig(3250),
        ),
        "#36",
        3250,
        3.27866,
        10,
    ),
    "muon_record12": Published(
        Recipe(
            "muon_track3",
            MuonConfig(0.035, weight_decay=0.025, ns_dtype="bfloat16", **NS12),
            AUXILIARY_OLD,
            ScheduleConfig(3350),
        ),
        "#12",
        3325,
        3.27905,
        20,
    ),
    "muon_mlp_decay": Published(
        Recipe(
            "muon_track3",
            MuonConfig(
                0.025,
                weight_decay=0.01,
                ns_dtype="bfloat16",
                b1_warmup=300,
                mlp_decay=2.0,
                **NS5_VARYING,
            ),
            AuxiliaryConfig(0.3, 1 / 320, 0.015),
            ScheduleConfig(5960),
        ),
        "records/track_2_medium, record 8 (2025-04-22), Muon with twice the decay on MLPs",
        5960,
        2.91975,
        1,
        same_model=False,
        note="Published for the 454M model of the medium track and a mean loss.",
    ),
    "muonh": Published(
        Recipe(
            "muon_track3",
            MuonConfig(0.018, weight_decay=0.0, ns_dtype="bfloat16", hyperball=True, **NS12),
            AUXILIARY_OLD,
            ScheduleConfig(3325, cooldown=0.4),
            CooldownConfig(),
            "record27",
        ),
        "#5",
        3325,
        3.27821,
        10,
        note="Initial weights are assumed: those of #27.",
    ),
    "shampoo": Published(
        Recipe(
            "shampoo",
            ShampooConfig(
                0.01, weight_decay=0.1, b1=0.9, b2=0.9, cutoff="positive", block_size=8192
            ),
            AUXILIARY_OLD,
            ScheduleConfig(3375),
        ),
        "#35",
        3375,
        3.27666,
        2,
        note="Eigenvalues <= 0 are dropped and no others, noise is kept.",
    ),
    "shampoo_record21": Published(
        Recipe(
            "shampoo",
            ShampooConfig(
                0.0015,
                weight_decay=0.2,
                b1=0.9,
                b2=0.95,
                cutoff="shift",
                every=5,
                block_size=8192,
                graft_b2=0.95,
                graft_eps=1e-10,
            ),
            AUXILIARY_OLD,
            ScheduleConfig(4150),
        ),
        "#21",
        4100,
        3.27759,
        4,
    ),
    "shampoo_third": Published(
        Recipe(
            "shampoo",
            ShampooConfig(
                0.025,
                weight_decay=0.05,
                b1=0.95,
                b2=0.9,
                cutoff="positive",
                block_size=8192,
                exponent=1 / 3,
                size="rows",
            ),
            AUXILIARY_TUNED,
            ScheduleConfig(3150),
        ),
        "pull request 327",
        3150,
        3.277395,
        4,
        note="Published: two sides, pseudo-inverse, exponent -1/3, norm sqrt(rows). Rates, decays "
        "and weight decay are not; Muon's (#36) stand in for them.",
    ),
    "soap": Published(
        Recipe(
            "soap",
            SoapConfig(0.003, weight_decay=0.01, b1=0.95, b2=0.95, eps=1e-8, every=10),
            AUXILIARY_OLD,
            ScheduleConfig(3375),
        ),
        "arXiv:2409.11321",
        same_model=False,
        note="The paper's settings; never published for this benchmark.",
    ),
    "soap_h": Published(
        Recipe(
            "soap",
            SoapConfig(
                0.018,
                weight_decay=0.0,
                b1=0.95,
                b2=0.9,
                eps=1e-8,
                every=1,
                form="record27",
                hyperball=True,
            ),
            AUXILIARY_OLD,
            ScheduleConfig(3125, cooldown=0.4),
            CooldownConfig(power=1.25, horizon=1.024),
            "record27",
        ),
        "#27",
        3125,
        3.27817,
        6,
    ),
    "kl_shampoo": Published(
        Recipe(
            "kl_shampoo",
            KLConfig(0.003, weight_decay=0.01, tokens=524288),
            AUXILIARY_OLD,
            ScheduleConfig(3375),
        ),
        "arXiv:2509.03378",
        same_model=False,
        note="The settings of the paper's code; never published for this benchmark.",
    ),
    "kl_soap_h": Published(
        Recipe(
            "kl_soap",
            KLConfig(
                0.018,
                weight_decay=0.0,
                b1=0.95,
                b2=0.9,
                every=1,
                cap=4000.0,
                first_weight=1.0,
                hyperball=True,
            ),
            AUXILIARY_OLD,
            ScheduleConfig(3125, cooldown=0.4),
            CooldownConfig(),
            "record27",
        ),
        "#19",
        3125,
        3.27800,
        6,
    ),
    "psgd": Published(
        Recipe(
            "psgd",
            PsgdConfig(0.025, weight_decay=0.0, b1=0.95, hyperball=True),
            AUXILIARY_OLD,
            ScheduleConfig(3400, cooldown=0.5, final=0.1),
            CooldownConfig(),
            "record33",
        ),
        "#33",
        3375,
        3.27791,
        5,
        note="The preconditioner is this package's port; the published one saw a mean loss.",
    ),
    "lion": Published(
        Recipe(
            "lion",
            LionConfig(1e-4, weight_decay=1.0),
            AUXILIARY_OLD,
            ScheduleConfig(4950, warmup_steps=100),
        ),
        "arXiv:2302.06675: betas (0.9, 0.99), a tenth of AdamW's rate, ten times its decay",
        same_model=False,
        note="The board lists Lion without a result.",
    ),
    "sophia": Published(
        Recipe(
            "sophia",
            SophiaConfig(6e-4, weight_decay=0.2),
            AUXILIARY_OLD,
            ScheduleConfig(4950, warmup_steps=100),
        ),
        "arXiv:2305.14342; Optax's defaults",
        inside_rules=False,
        same_model=False,
        note="Every tenth step takes a second pass through the batch. The board lists Sophia "
        "without a result.",
    ),
}
