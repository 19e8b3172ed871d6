"""The data of a run: checked shards, and their batches on the device."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax

import data_pipeline
from data_pipeline import Baselines, Manifest
from nanogpt.config.prepared import PADDING
from nanogpt.config.run import Config
from nanogpt.train.mesh import Layout
from nanogpt.train.paths import Path
from nanogpt.train.stored import expecting_form
from nanogpt.train.train_step import Batch


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        training: yields this process's rows of batch after batch; checkpointable.
        validation: returns the validation batches, from the first, at each call.
        fingerprint: identifies shards and order.
        identity: what the losses are about: shards, data, tokenizer (None where the folder's
            manifest does not tell), model, validation tokens; runs that differ in one of the last
            four cannot be compared.
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

    def begun_with(self, digest: str) -> "RunData":
        """Returns what a run reads that begins with parameters of this digest."""
        model = f"{self.identity['model']}, begun with {digest}"
        return dataclasses.replace(self, identity=self.identity | {"model": model})


def open_data(config: Config) -> RunData:
    """Opens the shards of a run and refuses bad or too few ones before any work is done.

    Raises:
        ShardError: names the file and the remedy.
        ValueError: val_tokens is not a whole number of microbatches.
    """
    data, length = config.data, config.model.sequence_length
    first = data_pipeline.shard_paths(data.directory, "train")[0]
    scored = data_pipeline.shard_paths(data.directory, "val")[0]
    told = pathlib.Path(data.directory, "manifest.json").exists()
    manifest = data_pipeline.read_manifest(data.directory) if told else None
    notes = _notes(config, manifest) if manifest else ()
    training, order = _training_shards(config), _order(config)
    data_pipeline.check_shards([*training, scored], config.model.vocab_size)
    if manifest is not None:
        manifest.check([*training, scored])
    place = {"rank": jax.process_index(), "world": jax.process_count()}
    held_out = data_pipeline.open_tokens(scored)  # once: a change is noticed

    def validation() -> Iterator[data_pipeline.Batch]:
        rows = data.microbatch_rows
        each = data.val_length or length
        sizes = {"sequence_length": each, "val_tokens": data.val_tokens, "rows": rows}
        return data_pipeline.val_batches(held_out, **sizes, **place)

    validation()  # raises if val_tokens does not suit the shard
    baselines = manifest.baselines if manifest else None
    known = baselines is not None and baselines.val_tokens == data.val_tokens
    return RunData(
        training=data_pipeline.train_batches(training, seed=data.seed, **order, **place),
        validation=validation,
        fingerprint=data_fingerprint(config),
        identity=_identity(config, manifest, first, scored),
        baselines=baselines if known else None,
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


def go_to(data: grain.DatasetIterator, step: int, folder: Path) -> None:
    """Moves a run's batches to what follows a checkpoint, whatever number of processes saved it.

    A step is a batch of every process. Where as many saved it, what Grain wrote is compared.

    Args:
        data: moved.
        step: batches that were handed out.
        folder: what Grain wrote, a file a process.

    Raises:
        ValueError: Grain had handed out another number of batches.
    """
    told = folder / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
    with expecting_form(told, ValueError):
        found = json.loads(told.read_bytes())["next_index"] if told.exists() else step
    if found != step:
        raise ValueError(f"{told} tells of {found} batches, the state of {step} updates.")
    grain.experimental.set_next_index(data, step)


def to_device(batch: data_pipeline.Batch, layout: Layout | None = None) -> Batch:
    """Moves this process's rows of a batch to its devices; on a mesh all rows make one array."""
    if layout is None:
        return jax.device_put(dict(batch))
    return {k: jax.make_array_from_process_local_data(layout.rows, x) for k, x in batch.items()}


def batch_pattern(
    rows: int, config: Config, layout: Layout | None = None, length: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, dtypes and layout of a batch of so many rows, to compile for.

    Args:
        rows: of all processes.
        config: the run.
        layout: of several devices.
        length: of a row; None for that of training.
    """
    shape, sharding = (rows, length or config.model.sequence_length), layout and layout.rows
    tokens = jax.ShapeDtypeStruct(shape, "int32", sharding=sharding)
    return {"inputs": tokens, "targets": tokens}


def _identity(
    config: Config, manifest: Manifest | None, first: pathlib.Path, scored: pathlib.Path
) -> dict[str, str | None]:
    """See `RunData.identity`. A longer run reads more shards: the first one stands for the data."""
    model, scored_tokens = config.model.scaled(), {"val_tokens": config.data.val_tokens}
    tokenizer = None
    if manifest is not None:
        source = manifest.source
        tokenizer = f"{source.tokenizer} {source.vocab_size} {source.merges_sha256[:12]}"
    sizes = (model.num_layers, model.model_dim, model.head_dim, model.mlp_dim)
    kind, place = "GPT", ""
    if model.kind == "medium":
        kind = "medium GPT"
        place = f", windows of {model.window} by {model.mask_block}, documents at "
        place += f"{model.end_of_text}, validation in rows of {config.data.val_length}"
    return {
        "shards": f"{first.name} and {scored.name}",
        "data": data_pipeline.fingerprint([first])[:16],
        "tokenizer": tokenizer,
        "model": f"{kind} {'x'.join(map(str, sizes))}, {model.vocab_size} ids, "
        f"rows of {model.sequence_length}{place}",
        "validation": f"{config.data.val_tokens} tokens of "
        f"{data_pipeline.fingerprint([scored], **scored_tokens)[:16]}",
    }


def _notes(config: Config, manifest: Manifest) -> tuple[str, ...]:
    """What does not fit between the run and the text that its folder was made of.

    Raises:
        ShardError: the shards were made for a larger vocabulary than the model's, or with another
            end of text than the one at which the model's documents begin.
    """
    folder, notes = config.data.directory, []
    made_for, size = manifest.source.vocab_size, config.model.vocab_size
    found, scored = manifest.baselines.val_tokens, config.data.val_tokens
    if made_for > size:
        raise data_pipeline.ShardError(
            f"{folder}: its shards have a vocabulary of {made_for}, model.vocab_size is {size}; "
            f"set --model.vocab-size {made_for}, or prepare the text again with "
            f"--vocab-size {size}."
        )
    end = made_for - 1  # the last id, see `data_pipeline.tokenizer`
    if config.model.kind == "medium" and config.model.end_of_text != end:
        raise data_pipeline.ShardError(
            f"{folder}: its texts begin with token {end}, model.end_of_text is "
            f"{config.model.end_of_text}: attention would not keep to documents; set "
            f"--model.end-of-text {end}."
        )
    if size - made_for >= PADDING:
        notes.append(
            f"warning: the shards in {folder} use only {made_for} of the {size} ids of "
            f"model.vocab_size; set --model.vocab-size {made_for}, or prepare the text again with "
            f"--vocab-size {size}"
        )
    if found != scored:
        notes.append(
            f"warning: no bigram line and no bits per byte, since {folder} tells them for {found} "
            f"validation tokens and this run scores {scored}; prepare the text again with "
            f"--val-tokens {scored}"
        )
    return tuple(notes)
