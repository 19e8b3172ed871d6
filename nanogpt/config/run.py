"""Every setting of a training run, as frozen dataclasses; those of optimizers in `settings.py`.

The classes hold no numbers of their own beyond what the benchmark fixes for every optimizer;
`presets.toml` and `optimizers.toml` hold the values. A field's trailing comment is its `--help`
text. Impossible values are refused where they are set, before any work.
"""

import dataclasses
import pathlib
import re
from typing import Literal

import tyro

from nanogpt.config.settings import Dtype, MatrixConfig, check, check_types

Init = Literal["benchmark", "record2", "record27", "record33", "record37", "record44", "medium"]


MEDIUM_LAYERS = 16  # of the model of kind medium
# Of attention by blocks: float32 holds the sum of exponentials of 27 * 128 scores of 0.12 * 640.
WIDEST_HEAD = 640


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
    # auto: cudnn flash attention on GPU; of kind medium block by block, dense all pairs at once.
    attention: Literal["auto", "xla", "cudnn", "dense"] = "auto"
    init: Init = "benchmark"  # initial weights, see nanogpt.model.init.linear
    remat: bool = False  # compute activations of a block again for its gradient: less memory
    width_multiplier: float = 1.0  # of model_dim and mlp_dim: a wider model of the same family
    depth_multiplier: float = 1.0  # of num_layers
    # The run's hyperparameters are those of multipliers 1, see shampoo_jax.transfer_rules.
    transfer: bool = False
    kind: Literal["track3", "medium"] = "track3"  # which benchmark's model
    head_columns: int | None = None  # of the output head, if more than vocab_size
    end_of_text: int = 50256  # token that begins a document, which attention does not leave; medium
    mask_block: int = 128  # positions of a block of attention's window; medium
    window: int = 3456  # tokens of it at the end of the run, a multiple of mask_block; medium
    # How kernels of blocks become bfloat16; medium.
    kernel_rounding: Literal["nearest", "toward_zero"] = "nearest"

    def __post_init__(self):
        check_types(self)
        check(self, "positive and finite", "width_multiplier", "depth_multiplier")
        sizes = ("vocab_size", "num_layers", "model_dim", "head_dim", "mlp_dim", "sequence_length")
        check(self, "at least 1", *sizes)
        if self.model_dim % self.head_dim:
            raise ValueError(
                f"head_dim={self.head_dim} does not divide model_dim={self.model_dim}: "
                "choose a head_dim that does."
            )
        if self.head_dim % 4:
            raise ValueError(
                f"head_dim={self.head_dim} must be a multiple of 4: half of its pairs rotate."
            )
        if (self.width_multiplier, self.depth_multiplier) != (1, 1):
            self.scaled()
        check(self, "at least 1", "head_columns", "mask_block", "window")
        check(self, "at least 0", "end_of_text")
        self._check_kind()

    def _check_kind(self) -> None:
        """Refuses what the two models do not have in common."""
        if (self.head_columns or self.vocab_size) < self.vocab_size:
            raise ValueError(
                f"head_columns={self.head_columns}: must be at least vocab_size={self.vocab_size}."
            )
        if self.kind == "track3":
            if self.attention == "dense" or self.init == "medium":
                raise ValueError(
                    f"kind='track3' with attention={self.attention!r}, init={self.init!r}: 'dense' "
                    "and 'medium' are of kind='medium'; choose others."
                )
            return
        if self.attention == "cudnn" or self.init != "medium":
            raise ValueError(
                f"kind='medium' with attention={self.attention!r}, init={self.init!r}: cuDNN knows "
                "no documents, and there is one start; set attention='auto', init='medium'."
            )
        if self.num_layers * self.depth_multiplier != MEDIUM_LAYERS:
            raise ValueError(
                f"kind='medium' with num_layers={self.num_layers}: its layers differ from each "
                f"other, set num_layers={MEDIUM_LAYERS}."
            )
        if self.attention != "dense" and self.head_dim > WIDEST_HEAD:
            raise ValueError(
                f"head_dim={self.head_dim}: attention by blocks takes at most {WIDEST_HEAD}, where "
                "exponentials end; set a smaller one, or attention='dense'."
            )
        if self.end_of_text >= self.vocab_size:
            raise ValueError(
                f"end_of_text={self.end_of_text}: must be below vocab_size={self.vocab_size}, or "
                "all text is one document."
            )
        for name in ("sequence_length", "window"):
            _check_blocks(name, getattr(self, name), self)

    def scaled(self) -> "ModelConfig":
        """The sizes themselves, with multipliers 1.

        >>> small = ModelConfig(64, 2, 16, 8, 64, 4, width_multiplier=2.0, depth_multiplier=1.5)
        >>> small.scaled().model_dim, small.scaled().mlp_dim, small.scaled().num_layers
        (32, 128, 3)
        """
        sizes = {
            "model_dim": self.model_dim * self.width_multiplier,
            "mlp_dim": self.mlp_dim * self.width_multiplier,
            "num_layers": self.num_layers * self.depth_multiplier,
        }
        for name, size in sizes.items():
            if size != int(size):
                multiplier = "depth" if name == "num_layers" else "width"
                raise ValueError(
                    f"{multiplier}_multiplier={getattr(self, multiplier + '_multiplier')} makes "
                    f"{name}={size}: choose one that gives whole numbers."
                )
        whole = {name: int(size) for name, size in sizes.items()}
        return dataclasses.replace(self, **whole, width_multiplier=1.0, depth_multiplier=1.0)


def _check_blocks(name: str, tokens: int | None, model: ModelConfig) -> None:
    """Refuses rows that are not whole blocks of attention's mask."""
    if tokens is not None and tokens % model.mask_block:
        raise ValueError(f"{name}={tokens}: must be a multiple of mask_block={model.mask_block}.")


def check_folders(*, of_runs: bool = False, **folders: str) -> None:
    """Refuses folders that are none of this machine's: as a path, gs://x would be ./gs:/x.

    Those of runs may lie in Google's object store.
    """
    more = " or gs://BUCKET/FOLDER" if of_runs else ""
    for name, value in folders.items():
        if re.match(r"\w+:/", value) and not (of_runs and re.match("gs://[^/]", value)):
            raise ValueError(
                f"{name}={value!r}: must be a folder of this machine{more}; copy the data here, or "
                "mount the bucket (gcsfuse, mountpoint-s3) and name the mounted folder."
            )


def check_name(name: str) -> None:
    """Refuses a name of runs that is no folder of its own below that of all runs."""
    path = pathlib.PurePath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"name={name!r}: must be a folder inside output.directory, as in 'mine/first'; set "
            "output.directory to write elsewhere."
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which tokens are read, in which order, in pieces of which size."""

    directory: str  # folder of *_train_*.bin and *_val_*.bin shards, see nanogpt data
    mode: Literal["sequential", "shuffled"]  # sequential: the benchmark's order; shuffled: by seed
    batch_rows: int  # rows in one optimizer step, over all devices
    microbatch_rows: int  # rows in one forward-backward pass; must divide batch_rows
    val_tokens: int  # tokens of the validation shard that are scored
    seed: int = 0  # order of the rows in mode shuffled
    val_length: int | None = None  # tokens in a row of validation; None: as in training

    def __post_init__(self):
        check_types(self)
        check_folders(directory=self.directory)
        check(self, "at least 1", "batch_rows", "microbatch_rows", "val_tokens", "val_length")
        check(self, "at least 0", "seed")
        if self.batch_rows % self.microbatch_rows:
            raise ValueError(
                f"microbatch_rows={self.microbatch_rows} does not divide "
                f"batch_rows={self.batch_rows}: choose a divisor."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CooldownConfig:
    """A schedule of the block matrices' own, of as many steps as the run's."""

    cooldown: float = 1.0  # fraction of the horizon over which eta falls
    warmup_steps: int | None = None  # eta is capped by (s + 1) / warmup_steps; None: as the run's
    warmup_from: float | None = None  # learning rate of the first update; replaces the cap's rule
    power: float = 1.0  # exponent of the cooldown's straight line
    horizon: float = 1.0  # where the line ends, in multiples of steps
    final: float = 0.0  # multiplier where the line ends

    def __post_init__(self):
        check_types(self)
        check(self, "between 0 and 1", "cooldown", "final")
        check(self, "positive and finite", "power")
        check(self, "at least 1 and finite", "horizon")
        check(self, "at least 0", "warmup_steps")
        check(self, "at least 0 and finite", "warmup_from")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(CooldownConfig):
    """Learning-rate multiplier eta(s) of update s = 0..steps-1, common to all groups."""

    steps: int  # optimizer steps
    _: dataclasses.KW_ONLY
    cooldown: float = 0.7  # fraction of the steps over which eta falls linearly to 0
    warmup_steps: int = 0  # eta is capped by (s + 1) / warmup_steps
    shape: Literal["linear", "cosine"] = "linear"  # cosine: from the warmup's end at the earliest

    def __post_init__(self):
        super().__post_init__()
        check(self, "at least 1", "steps")


@dataclasses.dataclass(frozen=True)
class LookaheadConfig:
    """EMA-Nesterov: gradients are taken ahead of the weights, along the average of their steps.

    Step s takes its gradient `size` times eta(s - 1) of the average ahead.
    """

    size: float  # at eta = 1
    start: int  # first step that does
    end: int  # first step that does not any more
    decay: float = 0.99  # of the average

    def __post_init__(self):
        check_types(self)
        check(self, "at least 0 and finite", "size")
        check(self, "at least 1", "start", "end")
        check(self, "at least 0 and below 1", "decay")


@dataclasses.dataclass(frozen=True)
class TailConfig:
    """Validation of the weights mixed with the average of the last ones, but the embedding's."""

    start: int  # updates after which the average begins
    tau: float = 150.0  # updates that it is over
    share: float = 0.6  # of the average in what is validated
    end: int | None = None  # updates from which on the average stays as it is

    def __post_init__(self):
        check_types(self)
        check(self, "at least 1", "start", "end", "tau")
        check(self, "between 0 and 1", "share")


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
    vector_b1: float | None = None  # of biases and gains; None: as b1
    vector_eps: float | None = None  # likewise
    # Of biases and gains: b2 of gains, attention's output biases and the others; None: as b2.
    vector_b2: tuple[float, float, float] | None = None
    vector_bias_correction: bool = True  # whether their moments are divided by 1 - b^t

    def __post_init__(self):
        check_types(self)
        rates = ("embed_learning_rate", "head_learning_rate", "vector_learning_rate")
        check(self, "positive and finite", *rates)
        check(self, "at least 0 and finite", "weight_decay", "eps", "vector_eps")
        check(self, "at least 0 and below 1", "b1", "b2", "vector_b1")
        for b2 in self.vector_b2 or ():
            if not 0 <= b2 < 1:
                raise ValueError(
                    f"vector_b2={self.vector_b2}: each must be at least 0 and below 1."
                )


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """What a run leaves behind, and how often."""

    directory: str = "runs"  # the run's folder is directory/name
    log_every: int = 10  # steps between records of the training loss
    checkpoint_every: int = 0  # steps between checkpoints; 0: only at the end or when interrupted
    checkpoint_minutes: float = 0.0  # at most so long between checkpoints; 0: as steps say
    keep_checkpoints: int = 2  # newest checkpoints kept; the last one before the cooldown always is
    keep_every: int = 0  # also those of every so many steps; 0: none
    keep_best: int = 0  # also those of lowest validation loss, each validation saves one; 0: none
    # Beside metrics.jsonl, in the run's folder; of a package each.
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self):
        check_types(self)
        check_folders(of_runs=True, directory=self.directory)
        if "tensorboard" in self.sinks:
            check_folders(**{"directory, with sinks=tensorboard,": self.directory})
        check(self, "at least 1", "log_every", "keep_checkpoints")
        check(self, "at least 0", "checkpoint_every", "keep_every", "keep_best")
        check(self, "at least 0 and finite", "checkpoint_minutes")


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
    matrices: MatrixConfig  # its hyperparameters, of a class in `nanogpt.config.settings`
    auxiliary: AuxiliaryConfig
    output: OutputConfig = OutputConfig()
    # Schedule of the block matrices, if they have their own; None: that of the run.
    matrices_cooldown: CooldownConfig | None = None
    lookahead: LookaheadConfig | None = None
    tail: TailConfig | None = None  # None: the weights themselves are validated
    # Whose gradients optimizers get: every eps is on their scale.
    loss: Literal["sum", "mean"] = "sum"
    val_every: int = 125  # steps between validations while s < 0.9 * steps
    val_every_final: int = 25  # steps between validations afterwards
    clip_norm: float | None = None  # largest norm of the mean loss's gradient; longer is scaled
    init_from: str = ""  # folder of a run with whose parameters this one begins
    # Folder of a run of other steps: from its newest checkpoint before its schedule is another one.
    go_on_from: str = ""
    nonfinite_limit: int = 10  # skipped steps in a row that end the run; exit code 3
    profile: bool = False  # write a trace of three steps into the run's folder
    mesh: str = ""  # devices, as in data=2,fsdp=4; -1: all that are left; empty: one device
    # Gradients are summed over devices once a step, each keeping its part, instead of whole for
    # every microbatch; needs fsdp=1. None: where that is so and no statistics are of microbatches.
    scatter_gradients: bool | None = None

    def __post_init__(self):
        check_types(self)
        check(self, "at least 0", "seed")
        check(self, "at least 1", "val_every", "val_every_final", "nonfinite_limit")
        check(self, "positive and finite", "clip_norm")
        check_folders(name=self.name)
        check_folders(of_runs=True, init_from=self.init_from, go_on_from=self.go_on_from)
        if self.profile:
            check_folders(**{"output.directory, with profile=True,": self.output.directory})
        parse_mesh(self.mesh)
        if self.model.kind == "medium":
            _check_blocks("val_length", self.data.val_length, self.model)
        check_name(self.name)
