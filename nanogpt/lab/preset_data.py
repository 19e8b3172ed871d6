"""The data of the presets: text and shards are made where a run's folder lacks them."""

import os

from data_pipeline import fineweb, gpt2, missing, prepare, shards_needed, sotu
from data_pipeline.download import shard_bytes
from data_pipeline.manifest import FILE_NAME
from data_pipeline.tokenizer import GPT2_VOCAB_SIZE
from nanogpt.config.presets import preset
from nanogpt.config.run import Config


def prepare_data(config: Config) -> None:
    """Brings a preset's own folder up to date; nothing is done where it fits the run already."""
    directory = config.data.directory
    if directory == preset("track3", "adamw").data.directory:
        download(config)
    elif directory in [preset(name, "adamw").data.directory for name in ("cpu", "board")]:
        if not os.path.exists(os.path.join(directory, FILE_NAME)):
            print(f"preparing text in {directory}", flush=True)
        tokenizer = gpt2(min(config.model.vocab_size, GPT2_VOCAB_SIZE))
        prepare(sotu(), directory, tokenizer, val_tokens=config.data.val_tokens)


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
