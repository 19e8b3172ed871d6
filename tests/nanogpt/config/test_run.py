"""Impossible settings are refused where they are set."""

import dataclasses
import math

import pytest

from nanogpt.config.presets import PRESETS, preset
from nanogpt.config.settings import (
    KLConfig,
    LionConfig,
    MatrixConfig,
    MuonConfig,
    PsgdConfig,
    ShampooConfig,
    SoapConfig,
    SophiaConfig,
)

CONFIG = preset("cpu", "shampoo")
WRONG = [
    *(("", name, 0) for name in ("val_every", "val_every_final")),
    ("", "seed", -1),
    *(("", "name", name) for name in ("", ".", "../up", "a/../../up", "/absolute")),
    *(("model", name, 0) for name in ("vocab_size", "num_layers", "model_dim", "head_dim")),
    *(("model", name, -4) for name in ("head_dim", "mlp_dim", "sequence_length")),
    *(("data", name, 0) for name in ("batch_rows", "microbatch_rows", "val_tokens")),
    ("data", "seed", -1),
    *((section, "directory", "gs://bucket/a") for section in ("data", "output")),
    *(("", name, "s3://bucket/a") for name in ("name", "init_from", "go_on_from")),
    ("output", "directory", "gs:/bucket"),
    ("", "clip_norm", 0.0),
    ("schedule", "steps", 0),
    *(("schedule", "cooldown", value) for value in (-0.1, 1.1, math.nan)),
    *(("schedule", "final", value) for value in (-0.1, 1.1)),
    ("schedule", "power", 0.0),
    *(("schedule", "horizon", value) for value in (0.9, math.inf)),
    ("schedule", "warmup_steps", -1),
    ("schedule", "warmup_from", -1e-7),
    *(("matrices", "learning_rate", value) for value in (0.0, -0.1, math.inf, math.nan)),
    *(("matrices", name, 1.0) for name in ("b1", "b2", "graft_b2")),
    *(("matrices", name, 0) for name in ("every", "block_size", "exponent")),
    ("matrices", "weight_decay", -0.1),
    ("auxiliary", "head_learning_rate", 0.0),
    ("auxiliary", "b1", 1.0),
    ("output", "log_every", 0),
    ("output", "keep_checkpoints", 0),
    ("output", "checkpoint_every", -1),
]


@pytest.mark.parametrize(("group", "name", "value"), WRONG)
def test_impossible_values_are_named(group, name, value):
    settings = getattr(CONFIG, group) if group else CONFIG
    with pytest.raises(ValueError, match=f"^{name}={value!r}: must be"):
        dataclasses.replace(settings, **{name: value})


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        (MuonConfig, "b1_warmup", -1),
        (MuonConfig, "mlp_decay", -1.0),
        (SoapConfig, "every", 0),
        (KLConfig, "tokens", 0),
        (KLConfig, "max_scale", 0.0),
        (KLConfig, "first_weight", 1.5),
        (PsgdConfig, "preconditioner_rate", 0.0),
        (PsgdConfig, "preconditioner_seed", -1),
        (LionConfig, "b2", 1.0),
        (SophiaConfig, "gamma", 0.0),
        (SophiaConfig, "every", 0),
        (MatrixConfig, "weight_decay", math.nan),
    ],
)
def test_impossible_values_of_every_optimizer_are_named(settings, name, value):
    with pytest.raises(ValueError, match=f"^{name}={value!r}: must be"):
        settings(**({"learning_rate": 0.1, "weight_decay": 0.0} | {name: value}))


def test_decay_on_a_hyperball_is_refused():
    with pytest.raises(ValueError, match=r"weight_decay=0.1 with hyperball=True.*weight_decay=0\."):
        SoapConfig(0.1, weight_decay=0.1, hyperball=True)


@pytest.mark.parametrize("preset_name", PRESETS)
def test_matrices_of_every_recipe_are_checked(preset_name):
    for optimizer in PRESETS[preset_name]:
        matrices = preset(preset_name, optimizer).matrices
        with pytest.raises(ValueError, match="b1=-0.5: must be at least 0 and below 1"):
            type(matrices)(**dict(dataclasses.asdict(matrices), b1=-0.5))


def test_borders_are_possible():
    dataclasses.replace(CONFIG.schedule, steps=1, cooldown=0.0, warmup_from=0.0)
    dataclasses.replace(CONFIG.schedule, cooldown=1.0)
    ShampooConfig(0.1, weight_decay=0.0, b1=0.0, graft_eps=0.0)
    dataclasses.replace(CONFIG, name="a/b.c/..d")
