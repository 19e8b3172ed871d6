"""Impossible settings are refused where they are set: the setting, its value, what it must be."""

import dataclasses
import math
import re

import numpy as np
import pytest

from nanogpt.config.presets import PRESETS, preset
from nanogpt.config.settings import (
    KLConfig,
    LionConfig,
    MatrixConfig,
    MuonConfig,
    PsgdConfig,
    ShampooConfig,
    ShampooNextConfig,
    SoapConfig,
    SophiaConfig,
)
from nanogpt.lab.search_space import Sweep

CONFIG = preset("cpu", "shampoo")
WHOLE, FOLDER = r"a whole number \(int\)", "a folder of this machine"
# Section of a run, setting, value, what the message says that it must be.
RUN = [
    *(("", name, 0, "at least 1") for name in ("val_every", "val_every_final")),
    *(("", "seed", value, must) for value, must in ((-1, "at least 0"), (0.5, WHOLE))),
    *(("", "name", name, "a folder inside") for name in ("", ".", "../up", "a/../../up", "/abs")),
    *(("", name, "s3://bucket/a", FOLDER) for name in ("name", "init_from", "go_on_from")),
    ("", "clip_norm", 0.0, "positive and finite"),
    ("", "clip_norm", "1", r"a number \(float\) or None"),
    ("", "val_every", True, WHOLE),
    ("", "profile", 1, "True or False"),
    ("", "scatter_gradients", "yes", "True or False or None"),
    ("", "mesh", "data=0", "sizes of the axes data and fsdp"),
    ("", "mesh", None, "a text"),
    ("", "nonfinite_limit", 0, "at least 1"),
    ("", "model", {}, "a ModelConfig"),
    ("", "matrices_cooldown", 0.5, "a CooldownConfig or None"),
    *(("model", n, 0, "at least 1") for n in ("vocab_size", "num_layers", "model_dim", "head_dim")),
    *(("model", n, -4, "at least 1") for n in ("head_dim", "mlp_dim", "sequence_length")),
    ("model", "num_layers", 2.0, WHOLE),
    ("model", "mlp_dim", np.int64(8), WHOLE),  # which JSON cannot hold
    ("model", "dtype", "float16", "one of 'float32', 'bfloat16'"),
    ("model", "attention", "flash", "one of 'auto', 'xla', 'cudnn'"),
    ("model", "init", None, "one of 'benchmark'"),
    ("model", "remat", "no", "True or False"),
    *(("data", n, 0, "at least 1") for n in ("batch_rows", "microbatch_rows", "val_tokens")),
    ("data", "seed", -1, "at least 0"),
    ("data", "mode", "random", "one of 'sequential', 'shuffled'"),
    ("data", "directory", 3, "a text"),
    ("data", "directory", "gs://bucket/a", FOLDER),
    *(("output", "directory", value, FOLDER) for value in ("s3://bucket/a", "gs:///a")),
    ("output", "directory", "gs:/bucket", FOLDER),
    ("output", "log_every", 0, "at least 1"),
    ("output", "keep_checkpoints", 0, "at least 1"),
    ("output", "checkpoint_every", -1, "at least 0"),
    ("output", "sinks", ("tensorbord",), "a tuple of which each is one of 'tensorboard', 'wandb'"),
    ("output", "sinks", "wandb", "a tuple"),
    ("schedule", "steps", 0, "at least 1"),
    ("schedule", "steps", "100", WHOLE),
    *(("schedule", "cooldown", x, "between 0 and 1") for x in (-0.1, 1.1, math.nan)),
    *(("schedule", "final", x, "between 0 and 1") for x in (-0.1, 1.1)),
    ("schedule", "power", 0.0, "positive and finite"),
    *(("schedule", "horizon", x, "at least 1 and finite") for x in (0.9, math.inf)),
    ("schedule", "warmup_steps", -1, "at least 0"),
    ("schedule", "warmup_from", -1e-7, "at least 0 and finite"),
    ("schedule", "shape", "cosin", "one of 'linear', 'cosine'"),
    *(("matrices", "learning_rate", x, "positive") for x in (0.0, -0.1, math.inf, math.nan)),
    ("matrices", "learning_rate", None, r"a number \(float\)"),
    *(("matrices", n, 1.0, "at least 0 and below 1") for n in ("b1", "b2", "graft_b2")),
    *(("matrices", n, 0, "at least 1") for n in ("every", "block_size")),
    ("matrices", "exponent", 0, "positive and finite"),
    ("matrices", "exponent", "both", "or one of 'left', 'right', 'smaller'"),
    ("matrices", "weight_decay", -0.1, "at least 0 and finite"),
    ("matrices", "damping", math.inf, "at least 0 and finite"),
    ("matrices", "cutoff", "absolute", "one of 'relative', 'positive', 'shift'"),
    ("auxiliary", "head_learning_rate", 0.0, "positive and finite"),
    ("auxiliary", "b1", 1.0, "at least 0 and below 1"),
    ("auxiliary", "eps", "1e-8", r"a number \(float\)"),
]
# Class of an optimizer's settings, setting, value, what it must be.
OPTIMIZERS = [
    (MuonConfig, "b1_warmup", -1, "at least 0"),
    (MuonConfig, "mlp_decay", -1.0, "at least 0 and finite"),
    (MuonConfig, "ns_coeffs", (3.4, -4.8), "a tuple of which each is"),
    (MuonConfig, "ns_dtype", "tf32", "one of 'float32', 'bfloat16'"),
    (SoapConfig, "every", 0, "at least 1"),
    (SoapConfig, "form", "meta", "one of 'paper', 'record27'"),
    (SoapConfig, "tolerance", 1.5, "between 0 and 1"),
    (KLConfig, "tokens", 0, "at least 1"),
    (KLConfig, "max_scale", 0.0, "positive and finite"),
    (KLConfig, "first_weight", 1.5, "between 0 and 1"),
    (ShampooNextConfig, "rtol", 1.0, "at least 0 and below 1"),
    (ShampooNextConfig, "floor", -1.0, "at least 0 and finite"),
    (PsgdConfig, "preconditioner_rate", 0.0, "positive and finite"),
    (PsgdConfig, "preconditioner_seed", -1, "at least 0"),
    (LionConfig, "b2", 1.0, "at least 0 and below 1"),
    (SophiaConfig, "gamma", 0.0, "positive and finite"),
    (SophiaConfig, "eps", 0.0, "positive and finite"),
    (SophiaConfig, "every", 0, "at least 1"),
    (MatrixConfig, "weight_decay", math.nan, "at least 0 and finite"),
    (MatrixConfig, "hyperball", 1, "True or False"),
]
# Setting of a sweep, value, what it must be.
SWEEP = [
    ("jobs", 0, "at least 1"),
    ("runs", 0, "at least 1"),
    ("runs", "12", WHOLE),
    ("search_seed", -1, "at least 0"),
    ("name", "../sweep", "a folder inside"),
    ("optimizers", "adamw", "a tuple of which each is a text"),
    ("grid", ["seed=1,2"], "a tuple of which each is a text"),
]


@pytest.mark.parametrize(
    ("settings", "name", "value", "must"),
    [(getattr(CONFIG, section) if section else CONFIG, *row) for section, *row in RUN]
    + [(kind(0.1, 0.0), *row) for kind, *row in OPTIMIZERS]
    + [(Sweep(), *row) for row in SWEEP],
)
def test_impossible_values_are_named(settings, name, value, must):
    with pytest.raises(ValueError, match=rf"^{name}={re.escape(repr(value))}: must .*{must}"):
        dataclasses.replace(settings, **{name: value})


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"weight_decay=0.1 with hyperball=True.*weight_decay=0\."):
        SoapConfig(0.1, weight_decay=0.1, hyperball=True)
    wrong = {
        "orthogonalize": False,
        "squares": "momentum",
        "rtol": 0.1,
        "every": 5,
        "stagger": True,
    }
    for name, value in wrong.items():
        settings = {"orthogonalize": True, name: value}
        with pytest.raises(ValueError, match=f"exponent=None with {name}={value!r}: without fac"):
            ShampooNextConfig(0.1, 0.0, exponent=None, **settings)
    with pytest.raises(ValueError, match="tolerance=0.1 with form='record27': only form='paper'"):
        SoapConfig(0.1, 0.1, form="record27", tolerance=0.1)
    with pytest.raises(ValueError, match=r"head_dim=12 does not divide model_dim=\d+: choose"):
        dataclasses.replace(CONFIG.model, head_dim=12)
    with pytest.raises(ValueError, match="head_dim=2 must be a multiple of 4"):
        dataclasses.replace(CONFIG.model, head_dim=2)
    with pytest.raises(ValueError, match="microbatch_rows=7 does not divide batch_rows=.*: choose"):
        dataclasses.replace(CONFIG.data, microbatch_rows=7)


@pytest.mark.parametrize("preset_name", PRESETS)
def test_matrices_of_every_recipe_are_checked(preset_name):
    for optimizer in PRESETS[preset_name]:
        matrices = preset(preset_name, optimizer).matrices
        with pytest.raises(ValueError, match="b1=-0.5: must be at least 0 and below 1"):
            type(matrices)(**dict(dataclasses.asdict(matrices), b1=-0.5))


def test_borders_are_possible():
    dataclasses.replace(CONFIG.schedule, steps=1, cooldown=0, warmup_from=0.0)
    dataclasses.replace(CONFIG.schedule, cooldown=1.0)
    ShampooConfig(0.1, weight_decay=0.0, b1=0.0, graft_eps=0.0)
    dataclasses.replace(CONFIG, name="a/b.c/..d")
    MuonConfig(0.1, 0.0, ns_coeffs=((3, -4.8, 2.0), (1.5, -0.5, 0)))
