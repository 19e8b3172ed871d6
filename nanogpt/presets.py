"""Complete runs by name: the published track 3 recipes, and their small copy for a CPU.

Source of every number of `track3`: KellerJordan/modded-nanogpt, records/track_3_optimization; the
result's number stands beside it.
"""

import dataclasses
from typing import NamedTuple

from nanogpt.config import (
    AdamWConfig,
    AuxiliaryConfig,
    Config,
    DataConfig,
    ModelConfig,
    MuonConfig,
    ScheduleConfig,
    ShampooConfig,
)

NS12 = {"ns_steps": 12, "ns_coeffs": (2.0, -1.5, 0.5)}
AUXILIARY_OLD = AuxiliaryConfig(0.3, 1 / 320, 0.01)  # until #35
AUXILIARY_TUNED = AuxiliaryConfig(0.7, 0.004, 0.015, weight_decay=0.001)  # since #36


class Recipe(NamedTuple):
    """What distinguishes one optimizer's run from another's."""

    optimizer: str
    matrices: AdamWConfig | MuonConfig | ShampooConfig
    auxiliary: AuxiliaryConfig
    schedule: ScheduleConfig


TRACK3: dict[str, Recipe] = {
    # Pull request 353: tuned AdamW, 4950 steps.
    "adamw": Recipe(
        "adamw",
        AdamWConfig(0.001, weight_decay=1.0, b1=0.9, b2=0.9, eps=1e-8),
        dataclasses.replace(AUXILIARY_TUNED, weight_decay=0.002),
        ScheduleConfig(4950, warmup_steps=100, warmup_from=1e-7),
    ),
    # #2: the first AdamW, 5625 steps. (Its script drew the weights otherwise.)
    "adamw_record2": Recipe(
        "adamw",
        AdamWConfig(0.0015, weight_decay=0.1, b1=0.9, b2=0.95, eps=1e-10),
        AUXILIARY_OLD,
        ScheduleConfig(5625, warmup_steps=250),
    ),
    # #12's rates with Optax's own Muon in the place of the benchmark's.
    "muon": Recipe(
        "muon",
        MuonConfig(0.035, weight_decay=0.025),
        AUXILIARY_OLD,
        ScheduleConfig(3350),
    ),
    # #36: the current Muon baseline, 3250 steps.
    "muon_track3": Recipe(
        "muon_track3",
        MuonConfig(0.025, weight_decay=0.05, ns_dtype="bfloat16", **NS12),
        AUXILIARY_TUNED,
        ScheduleConfig(3250),
    ),
    # #12: the Muon with the auxiliary rates of #35, read at step 3325 of 3350.
    "muon_record12": Recipe(
        "muon_track3",
        MuonConfig(0.035, weight_decay=0.025, ns_dtype="bfloat16", **NS12),
        AUXILIARY_OLD,
        ScheduleConfig(3350),
    ),
    # #35: two-sided Shampoo, eigenvalues <= 0 dropped, unblocked, 3375 steps.
    "shampoo": Recipe(
        "shampoo",
        ShampooConfig(0.01, weight_decay=0.1, b1=0.9, b2=0.9, cutoff="positive", block_size=8192),
        AUXILIARY_OLD,
        ScheduleConfig(3375),
    ),
}

# How these rates were found: docs/demo.md.
CPU_STEPS = 300
CPU_AUXILIARY = AuxiliaryConfig(0.3, 0.01, 0.01)
CPU: dict[str, Recipe] = {
    "adamw": Recipe(
        "adamw",
        AdamWConfig(0.004, weight_decay=0.1),
        CPU_AUXILIARY,
        ScheduleConfig(CPU_STEPS, warmup_steps=20),
    ),
    "muon": Recipe(
        "muon",
        MuonConfig(0.04, weight_decay=0.025),
        CPU_AUXILIARY,
        ScheduleConfig(CPU_STEPS),
    ),
    "muon_track3": Recipe(
        "muon_track3",
        MuonConfig(0.02, weight_decay=0.025, **NS12),
        CPU_AUXILIARY,
        ScheduleConfig(CPU_STEPS),
    ),
    "shampoo": Recipe(
        "shampoo",
        ShampooConfig(0.01, weight_decay=0.1),
        CPU_AUXILIARY,
        ScheduleConfig(CPU_STEPS),
    ),
}


def preset(name: str, optimizer: str) -> Config:
    """Looks up a complete run.

    Args:
        name: "track3" (162M parameters, FineWeb, a GPU) or "cpu" (1.3M parameters, minutes).
        optimizer: "adamw", "muon", "muon_track3", "shampoo"; of track3 also the earlier results
            "adamw_record2" and "muon_record12".

    Returns:
        The run's configuration, named "{name}-{optimizer}".

    Raises:
        ValueError: Unknown name or optimizer.

    Example:
        >>> preset("track3", "shampoo").schedule.steps
        3375
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is unknown: choose one of {', '.join(PRESETS)}.")
    recipes, base = PRESETS[name]
    if optimizer not in recipes:
        raise ValueError(
            f"optimizer={optimizer!r} is unknown in preset {name!r}: "
            f"choose one of {', '.join(recipes)}."
        )
    return dataclasses.replace(base, name=f"{name}-{optimizer}", **recipes[optimizer]._asdict())


_TRACK3_BASE = Config(
    name="track3",
    seed=0,
    model=ModelConfig(
        vocab_size=50304,
        num_layers=12,
        model_dim=768,
        head_dim=128,
        mlp_dim=3072,
        sequence_length=1024,
    ),
    data=DataConfig(
        directory="data/fineweb10B",
        mode="sequential",
        batch_rows=512,
        microbatch_rows=16,
        val_tokens=20 * 524288,
    ),
    mesh="data=-1",
    **TRACK3["muon_track3"]._asdict(),
)
_CPU_BASE = Config(
    name="cpu",
    seed=0,
    model=ModelConfig(
        vocab_size=2048,
        num_layers=4,
        model_dim=128,
        head_dim=64,
        mlp_dim=512,
        sequence_length=256,
        dtype="float32",
        embed_dtype="float32",
    ),
    data=DataConfig(
        directory="data/sotu",
        mode="shuffled",
        batch_rows=8,
        microbatch_rows=8,
        val_tokens=65536,
    ),
    val_every=40,
    val_every_final=20,
    **CPU["adamw"]._asdict(),
)
PRESETS: dict[str, tuple[dict[str, Recipe], Config]] = {
    "track3": (TRACK3, _TRACK3_BASE),
    "cpu": (CPU, _CPU_BASE),
}
