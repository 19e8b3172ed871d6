"""The data of a run: checked shards, and their batches on the device."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import grain
import jax

import data_pipeline
from data_pipeline import Baselines
from nanogpt.config import Config
from nanogpt.train_step import Batch


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        training: yields this process's rows of batch after batch; checkpointable.
        validation: returns the validation batches, from the first, at each call.
        fingerprint: identifies shards and order.
        baselines: losses of n-gram models on the tokens that validation scores; None if the
            folder's manifest does not tell.
    """

    training: grain.DatasetIterator
    validation: Callable[[], Iterator[data_pipeline.Batch]]
    fingerprint: str
    baselines: Baselines | None


def open_data(config: Config) -> RunData:
    """Opens the shards of a run and refuses bad or too few ones before any work is done.

    Raises:
        ShardError: names the file and the remedy.
        ValueError: val_tokens is not a whole number of microbatches.
    """
    data, length = config.data, config.model.sequence_length
    training = data_pipeline.shard_paths(data.directory, "train")
    scored = data_pipeline.shard_paths(data.directory, "val")[0]
    data_pipeline.check_shards([*training, scored], config.model.vocab_size)
    order = {"sequence_length": length, "batch_rows": data.batch_rows, "mode": data.mode}
    data_pipeline.require_tokens(training, steps=config.schedule.steps, **order)
    place = {"rank": jax.process_index(), "world": jax.process_count()}

    def validation() -> Iterator[data_pipeline.Batch]:
        rows = data.microbatch_rows
        sizes = {"sequence_length": length, "val_tokens": data.val_tokens, "rows": rows}
        return data_pipeline.val_batches(scored, **sizes, **place)

    validation()  # raises if val_tokens does not suit the shard
    return RunData(
        training=data_pipeline.train_batches(training, seed=data.seed, **order, **place),
        validation=validation,
        fingerprint=data_pipeline.fingerprint([*training, scored], seed=data.seed, **order),
        baselines=_baselines(data.directory, data.val_tokens),
    )


def to_device(batch: data_pipeline.Batch) -> Batch:
    """Moves a batch of this process's rows to the device. A mesh will come in here."""
    return jax.device_put(dict(batch))


def batch_pattern(rows: int, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of a batch of so many rows, to compile for."""
    tokens = jax.ShapeDtypeStruct((rows, config.model.sequence_length), "int32")
    return {"inputs": tokens, "targets": tokens}


def _baselines(directory: str, val_tokens: int) -> Baselines | None:
    """The manifest's figures if they are about the very tokens which the run scores."""
    if not (pathlib.Path(directory) / "manifest.json").exists():
        return None
    found = data_pipeline.read_manifest(directory).baselines
    return found if found.val_tokens == val_tokens else None
