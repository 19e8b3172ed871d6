"""The data of the presets: text and shards are made where a run's folder lacks them."""

import os

from data_pipeline import fineweb, gpt2, missing, prepare, read_manifest, shards_needed, sotu
from data_pipeline.download import shard_bytes
from data_pipeline.manifest import FILE_NAME
from nanogpt.config.presets import preset
from nanogpt.config.run import Config


def prepare_data(config: Config) -> None:
    """Brings a preset's own folder up to date; nothing is done where it fits the run already.

    Raises:
        ValueError: the run has another vocabulary than the folder, which other runs read.
    """
    directory = config.data.directory
    if directory == preset("track3", "adamw").data.directory:  # and of medium
        download(config)
    for own in (preset(name, "adamw") for name in ("cpu", "board")):
        if directory == own.data.directory:
            keep_vocabulary(directory, config.model.vocab_size, own.model.vocab_size)
            if not os.path.exists(os.path.join(directory, FILE_NAME)):
                print(f"preparing text in {directory}", flush=True)
            tokenizer = gpt2(config.model.vocab_size)
            prepare(sotu(), directory, tokenizer, val_tokens=config.data.val_tokens)


def keep_vocabulary(directory: str | os.PathLike[str], wanted: int, usual: int) -> None:
    """Refuses to replace shards that other runs read by those of another vocabulary.

    Args:
        directory: a preset's own folder.
        wanted: ids of the tokenizer that is asked for.
        usual: ids of the preset's, which the folder gets where there is none yet.
    """
    made = os.path.exists(os.path.join(directory, FILE_NAME))
    held = read_manifest(directory).source.vocab_size if made else usual
    if wanted != held:
        other = f"{directory}-{wanted}"
        raise ValueError(
            f"model.vocab_size={wanted}: {directory} is the folder of every run of its preset and "
            f"has {held} ids; it is not replaced. Make another one, `nanogpt data sotu --directory "
            f"{other} --vocab-size {wanted}`, and set --data.directory {other}."
        )


def download(config: Config) -> None:
    """Downloads the shards of FineWeb that the run reads and the folder does not hold."""
    batch_tokens = config.data.batch_rows * config.model.sequence_length
    shards = shards_needed(config.schedule.steps, batch_tokens)
    names = missing(config.data.directory, shards)
    if names:
        print(
            f"{config.schedule.steps} steps need {shards} training shards and one for validation: "
            f"downloading {len(names)} of them, {len(names) * shard_bytes() / 1e9:.1f} GB, to "
            f"{config.data.directory}",
            flush=True,
        )
        fineweb(config.data.directory, shards)
