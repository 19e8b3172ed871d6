"""The data of a run: checked shards, and their batches on the device."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax

import data_pipeline
from data_pipeline import Baselines
from nanogpt.config.prepared import PADDING
from nanogpt.config.run import Config
from nanogpt.train.mesh import Layout
from nanogpt.train.train_step import Batch


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        training: yields this process's rows of batch after batch; checkpointable.
        validation: returns the validation batches, from the first, at each call.
        fingerprint: identifies shards and order.
        identity: what the losses are about: data, tokenizer (None where the folder's manifest does
            not tell), model, validation tokens; runs that differ in one cannot be compared.
        baselines: losses of n-gram models on the tokens that validation scores; None if the
            folder's manifest does not tell.
        notes: what the user should know about these data before training on them.
    """

    training: grain.DatasetIterator
    validation: Callable[[], Iterator[data_pipeline.Batch]]
    fingerprint: str
    identity: dict[str, str | None]
    baselines: Baselines | None
    notes: tuple[str, ...]


def open_data(config: Config) -> RunData:
    """Opens the shards of a run and refuses bad or too few ones before any work is done.

    Raises:
        ShardError: names the file and the remedy.
        ValueError: val_tokens is not a whole number of microbatches.
    """
    data, length = config.data, config.model.sequence_length
    training = data_pipeline.shard_paths(data.directory, "train")
    scored = data_pipeline.shard_paths(data.directory, "val")[0]
    baselines, notes = _read_manifest(config)
    identity = _identity(config, training[0], scored)
    training, order = _training_shards(config), _order(config)
    data_pipeline.check_shards([*training, scored], config.model.vocab_size)
    place = {"rank": jax.process_index(), "world": jax.process_count()}

    def validation() -> Iterator[data_pipeline.Batch]:
        rows = data.microbatch_rows
        sizes = {"sequence_length": length, "val_tokens": data.val_tokens, "rows": rows}
        return data_pipeline.val_batches(scored, **sizes, **place)

    validation()  # raises if val_tokens does not suit the shard
    return RunData(
        training=data_pipeline.train_batches(training, seed=data.seed, **order, **place),
        validation=validation,
        fingerprint=data_fingerprint(config),
        identity=identity,
        baselines=baselines,
        notes=notes,
    )


def data_fingerprint(config: Config) -> str:
    """Identifies shards and order of a run: of a longer one in mode sequential, more shards."""
    scored = data_pipeline.shard_paths(config.data.directory, "val")[0]
    shards = [*_training_shards(config), scored]
    return data_pipeline.fingerprint(shards, seed=config.data.seed, **_order(config))


def _training_shards(config: Config) -> list[Any]:
    found = data_pipeline.shard_paths(config.data.directory, "train")
    return data_pipeline.needed_shards(found, steps=config.schedule.steps, **_order(config))


def _order(config: Config) -> dict[str, Any]:
    data, length = config.data, config.model.sequence_length
    return {"sequence_length": length, "batch_rows": data.batch_rows, "mode": data.mode}


def to_device(batch: data_pipeline.Batch, layout: Layout | None = None) -> Batch:
    """Moves this process's rows of a batch to its devices; on a mesh all rows make one array."""
    if layout is None:
        return jax.device_put(dict(batch))
    return {k: jax.make_array_from_process_local_data(layout.rows, x) for k, x in batch.items()}


def batch_pattern(
    rows: int, config: Config, layout: Layout | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, dtypes and layout of a batch of so many rows, to compile for."""
    shape, sharding = (rows, config.model.sequence_length), layout and layout.rows
    tokens = jax.ShapeDtypeStruct(shape, "int32", sharding=sharding)
    return {"inputs": tokens, "targets": tokens}


def _identity(
    config: Config, training: pathlib.Path, scored: pathlib.Path
) -> dict[str, str | None]:
    """See `RunData.identity`. A longer run reads more shards: the first one stands for the data."""
    model, manifest = config.model, pathlib.Path(config.data.directory) / "manifest.json"
    tokenizer = None
    if manifest.exists():
        source = data_pipeline.read_manifest(manifest.parent).source
        tokenizer = f"{source.tokenizer} {source.vocab_size} {source.merges_sha256[:12]}"
    sizes = (model.num_layers, model.model_dim, model.head_dim, model.mlp_dim)
    scored_tokens = {"val_tokens": config.data.val_tokens}
    return {
        "data": data_pipeline.fingerprint([training])[:16],
        "tokenizer": tokenizer,
        "model": f"GPT {'x'.join(map(str, sizes))}, {model.vocab_size} ids, "
        f"rows of {model.sequence_length}"
        + (f", begun with {config.init_from}" if config.init_from else ""),
        "validation": f"{config.data.val_tokens} tokens of "
        f"{data_pipeline.fingerprint([scored], **scored_tokens)[:16]}",
    }


def _read_manifest(config: Config) -> tuple[Baselines | None, tuple[str, ...]]:
    """The manifest's figures if they are about the very tokens which the run scores, and notes.

    Raises:
        ShardError: the shards were made for a larger vocabulary than the model's.
    """
    path = pathlib.Path(config.data.directory) / "manifest.json"
    if not path.exists():
        return None, ()
    manifest, notes = data_pipeline.read_manifest(path.parent), []
    made_for, size = manifest.source.vocab_size, config.model.vocab_size
    if made_for > size:
        raise data_pipeline.ShardError(
            f"{path.parent}: its shards have a vocabulary of {made_for}, model.vocab_size is "
            f"{size}; set --model.vocab-size {made_for}, or prepare the text again with "
            f"--vocab-size {size}."
        )
    if size - made_for >= PADDING:
        notes.append(
            f"warning: the shards in {path.parent} use only {made_for} of the {size} ids of "
            f"model.vocab_size; set --model.vocab-size {made_for}, or prepare the text again with "
            f"--vocab-size {size}"
        )
    found, scored = manifest.baselines, config.data.val_tokens
    if found.val_tokens == scored:
        return found, tuple(notes)
    notes.append(
        f"warning: no bigram line and no bits per byte, since {path} tells them for "
        f"{found.val_tokens} validation tokens and this run scores {scored}; prepare the text "
        f"again with --val-tokens {scored}"
    )
    return None, tuple(notes)
