"""FineWeb as GPT-2 tokens: the shards of the track-3 benchmark, from the Hugging Face hub."""

import os
from collections.abc import Callable
from pathlib import Path

import huggingface_hub

from data_pipeline.manifest import Source
from data_pipeline.shards import ShardError, read_header
from data_pipeline.tokenizer import GPT2_VOCAB_SIZE

REPOSITORY = "kjj0/fineweb10B-gpt2"
SHARD_TOKENS = 10**8
TRAIN_SHARDS = 103
VAL_TOKENS = 20 * 524288  # what the benchmark scores, the first of the validation shard

SOURCE = Source(
    corpus="fineweb",
    version=f"sample-10BT, {REPOSITORY}",
    licence="ODC-By 1.0 (HuggingFaceFW/fineweb)",
    split_rule="val: the first 10^8 tokens of the stream",
    tokenizer="gpt2",
    vocab_size=GPT2_VOCAB_SIZE,
)


def shards_needed(steps: int, batch_tokens: int, shard_tokens: int = SHARD_TOKENS) -> int:
    """Training shards that a sequential run reads.

    A batch never crosses shards and needs one more token than it has, so a shard gives
    floor((shard_tokens - 2) / batch_tokens) batches and the rest is dropped.

    >>> shards_needed(3375, 512 * 1024)
    18

    Args:
      steps: optimizer steps.
      batch_tokens: tokens in one step, over all devices.
      shard_tokens: tokens in one shard.

    Returns:
      The number of shards.

    Raises:
      ShardError: if not even one batch fits in a shard.
    """
    per_shard = (shard_tokens - 2) // batch_tokens
    if per_shard < 1:
        raise ShardError(
            f"batch_tokens={batch_tokens}: no batch fits in a shard of {shard_tokens} tokens; "
            "make the batch smaller."
        )
    return -(-steps // per_shard)


def fineweb(
    directory: str | os.PathLike[str],
    train_shards: int,
    fetch: Callable[..., object] = huggingface_hub.hf_hub_download,
) -> list[Path]:
    """Downloads the validation shard and the first training shards (200 MB each).

    Complete files are kept, partial ones continued, damaged ones fetched again: call it again
    after an interruption.

    Args:
      directory: folder to fill.
      train_shards: 1 to 103.
      fetch: downloads `filename` of `repo_id` into `local_dir`, as `hf_hub_download`.

    Returns:
      The files, validation first.

    Raises:
      ShardError: if `train_shards` is out of range, or a file is damaged after its download.
    """
    if not 1 <= train_shards <= TRAIN_SHARDS:
        raise ShardError(f"train_shards={train_shards}: {REPOSITORY} has 1 to {TRAIN_SHARDS}.")
    directory = Path(directory)
    names = ["fineweb_val_000000.bin"]
    names += [f"fineweb_train_{number:06d}.bin" for number in range(1, train_shards + 1)]
    for name in names:
        path = directory / name
        if _is_complete(path):
            continue
        path.unlink(missing_ok=True)
        fetch(repo_id=REPOSITORY, filename=name, repo_type="dataset", local_dir=str(directory))
        if not _is_complete(path):
            raise ShardError(
                f"{path}: damaged after its download; run the same command again, and see "
                f"whether the disk is full if it stays so."
            )
    return [directory / name for name in names]


def _is_complete(path: Path) -> bool:
    """Whether size and header agree and the shard is full (only the last one may be short)."""
    try:
        tokens = read_header(path)
    except ShardError:
        return False
    return tokens == SHARD_TOKENS or path.name == f"fineweb_train_{TRAIN_SHARDS:06d}.bin"
