"""Every setting of a training run, as frozen dataclasses.

The classes hold no numbers of their own beyond what the benchmark fixes for every optimizer;
`presets.py` holds the values. A field's trailing comment is its `--help` text. Impossible values
are refused where they are set, before any work.
"""

import dataclasses
import math
import pathlib
from typing import Any, Literal

import tyro

Dtype = Literal["float32", "bfloat16"]


def _check(settings: Any, rule: str, *names: str) -> None:
    """Raises ValueError if one of the named fields breaks a rule, a key of `_RULES`."""
    for name in names:
        value = getattr(settings, name)
        if not _RULES[rule](value):
            raise ValueError(f"{name}={value!r}: must be {rule}.")


_RULES = {
    "at least 1": lambda value: value >= 1,
    "at least 0": lambda value: value >= 0,
    "between 0 and 1": lambda value: 0 <= value <= 1,
    "at least 0 and below 1": lambda value: 0 <= value < 1,
    "positive and finite": lambda value: 0 < value < math.inf,
    "at least 0 and finite": lambda value: 0 <= value < math.inf,
}


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of mesh axes by name.

    Args:
        text: as in "data=2,fsdp=4"; one size may be -1.

    Raises:
        ValueError: anything else.

    >>> parse_mesh("data=2,fsdp=-1")
    {'data': 2, 'fsdp': -1}
    """
    pairs = [part.partition("=") for part in text.split(",")] if text else []
    axes = {name: int(size) for name, _, size in pairs if size.lstrip("-").isdigit()}
    sizes = list(axes.values())
    known = set(axes) <= {"data", "fsdp"} and len(axes) == len(pairs)
    if not known or any(n < 1 and n != -1 for n in sizes) or sizes.count(-1) > 1:
        raise ValueError(
            f"mesh={text!r}: must name sizes of the axes data and fsdp, as in 'data=2,fsdp=4'; one "
            "of them may be -1."
        )
    return axes


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and precision of the GPT."""

    vocab_size: int  # rows of the embedding, columns of the head (tokens; at least the tokenizer's)
    num_layers: int  # transformer blocks
    model_dim: int  # width of the residual stream
    head_dim: int  # width of one attention head; must divide model_dim
    mlp_dim: int  # hidden width of the MLP
    sequence_length: int  # tokens in a row
    dtype: Dtype = "bfloat16"  # residual stream and matrix products
    embed_dtype: Dtype = "bfloat16"  # stored embedding and its optimizer state
    attention: Literal["auto", "xla", "cudnn"] = "auto"  # auto: cudnn flash attention on GPU

    def __post_init__(self):
        sizes = ("vocab_size", "num_layers", "model_dim", "head_dim", "mlp_dim", "sequence_length")
        _check(self, "at least 1", *sizes)
        if self.model_dim % self.head_dim:
            raise ValueError(
                f"head_dim={self.head_dim} does not divide model_dim={self.model_dim}: "
                "choose a head_dim that does."
            )
        if self.head_dim % 4:
            raise ValueError(
                f"head_dim={self.head_dim} must be a multiple of 4: half of its pairs rotate."
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which tokens are read, in which order, in pieces of which size."""

    directory: str  # folder of *_train_*.bin and *_val_*.bin shards, see scripts.prepare_data
    mode: Literal["sequential", "shuffled"]  # sequential: the benchmark's order; shuffled: by seed
    batch_rows: int  # rows in one optimizer step, over all devices
    microbatch_rows: int  # rows in one forward-backward pass; must divide batch_rows
    val_tokens: int  # tokens of the validation shard that are scored
    seed: int = 0  # order of the rows in mode shuffled

    def __post_init__(self):
        _check(self, "at least 1", "batch_rows", "microbatch_rows", "val_tokens")
        _check(self, "at least 0", "seed")
        if self.batch_rows % self.microbatch_rows:
            raise ValueError(
                f"microbatch_rows={self.microbatch_rows} does not divide "
                f"batch_rows={self.batch_rows}: choose a divisor."
            )


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate multiplier eta(s) of update s = 0..steps-1, common to all groups."""

    steps: int  # optimizer steps
    cooldown: float = 0.7  # fraction of the steps over which eta falls linearly to 0
    warmup_steps: int = 0  # eta is capped by (s + 1) / warmup_steps
    warmup_from: float | None = None  # learning rate of the first update; replaces the cap's rule

    def __post_init__(self):
        _check(self, "at least 1", "steps")
        _check(self, "between 0 and 1", "cooldown")
        _check(self, "at least 0", "warmup_steps")
        if self.warmup_from is not None:
            _check(self, "at least 0 and finite", "warmup_from")


@dataclasses.dataclass(frozen=True)
class AdamWConfig:
    """AdamW on the block matrices."""

    learning_rate: float  # peak
    weight_decay: float  # decoupled, multiplied by the scheduled learning rate
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-10  # added to sqrt(second moment); on the scale of summed gradients

    def __post_init__(self):
        _check(self, "positive and finite", "learning_rate")
        _check(self, "at least 0 and finite", "weight_decay", "eps")
        _check(self, "at least 0 and below 1", "b1", "b2")


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """Muon on the block matrices."""

    learning_rate: float  # peak
    weight_decay: float  # decoupled, multiplied by the scheduled learning rate
    b1: float = 0.95  # decay of the momentum
    ns_steps: int = 5  # Newton-Schulz iterations
    ns_coeffs: tuple[float, float, float] = (3.4445, -4.775, 2.0315)  # quintic's coefficients
    ns_dtype: Dtype = "float32"  # precision of the Newton-Schulz iterations; muon_track3 only

    def __post_init__(self):
        _check(self, "positive and finite", "learning_rate")
        _check(self, "at least 0 and finite", "weight_decay")
        _check(self, "at least 0 and below 1", "b1")
        _check(self, "at least 1", "ns_steps")


@dataclasses.dataclass(frozen=True)
class ShampooConfig:
    """Shampoo with Adam grafting on the block matrices."""

    learning_rate: float  # peak
    weight_decay: float  # decoupled, multiplied by the scheduled learning rate
    b1: float = 0.9  # decay of the filtered gradient
    b2: float = 0.9  # decay of the factors
    cutoff: Literal["relative", "positive"] = "relative"  # keep eigenvalues > n*eps*max, or > 0
    every: int = 1  # steps between refreshes of the inverse roots
    block_size: int = 1024  # largest edge of a block
    graft_b2: float = 0.9  # decay of the grafted Adam's second moment
    graft_eps: float = 1e-15  # eps of the grafted Adam; on the scale of summed gradients

    def __post_init__(self):
        _check(self, "positive and finite", "learning_rate")
        _check(self, "at least 0 and finite", "weight_decay", "graft_eps")
        _check(self, "at least 0 and below 1", "b1", "b2", "graft_b2")
        _check(self, "at least 1", "every", "block_size")


@dataclasses.dataclass(frozen=True)
class AuxiliaryConfig:
    """AdamW on everything that is not a block matrix: embedding, head, biases and gains."""

    embed_learning_rate: float  # peak, embedding
    head_learning_rate: float  # peak, output head
    vector_learning_rate: float  # peak, biases and gains
    weight_decay: float = 0.0  # decoupled, multiplied by the scheduled learning rate
    b1: float = 0.8  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-10  # added to sqrt(second moment); on the scale of summed gradients

    def __post_init__(self):
        rates = ("embed_learning_rate", "head_learning_rate", "vector_learning_rate")
        _check(self, "positive and finite", *rates)
        _check(self, "at least 0 and finite", "weight_decay", "eps")
        _check(self, "at least 0 and below 1", "b1", "b2")


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """What a run leaves behind, and how often."""

    directory: str = "runs"  # the run's folder is directory/name
    log_every: int = 10  # steps between records of the training loss
    checkpoint_every: int = 0  # steps between checkpoints; 0: only at the end or when interrupted
    keep_checkpoints: int = 2  # newest checkpoints kept

    def __post_init__(self):
        _check(self, "at least 1", "log_every", "keep_checkpoints")
        _check(self, "at least 0", "checkpoint_every")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run: everything that decides its numbers."""

    name: str  # the run's folder under output.directory
    seed: int  # initialization
    model: ModelConfig
    data: DataConfig
    schedule: ScheduleConfig
    # Chosen together with the class of `matrices`, so not by a flag of its own.
    optimizer: tyro.conf.Suppress[str]  # registry name of the optimizer of the block matrices
    matrices: AdamWConfig | MuonConfig | ShampooConfig  # its hyperparameters
    auxiliary: AuxiliaryConfig
    output: OutputConfig = OutputConfig()
    val_every: int = 125  # steps between validations while s < 0.9 * steps
    val_every_final: int = 25  # steps between validations afterwards
    mesh: str = ""  # devices, as in data=2,fsdp=4; -1: all that are left; empty: one device

    def __post_init__(self):
        _check(self, "at least 0", "seed")
        _check(self, "at least 1", "val_every", "val_every_final")
        parse_mesh(self.mesh)
        path = pathlib.PurePath(self.name)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"name={self.name!r}: must be a folder inside output.directory, as in "
                "'mine/first'; set output.directory to write elsewhere."
            )
