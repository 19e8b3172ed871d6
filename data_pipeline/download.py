"""FineWeb as GPT-2 tokens: the shards of the track-3 benchmark, from the Hugging Face hub."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub

from data_pipeline.checks import scan
from data_pipeline.manifest import Source
from data_pipeline.shards import HEADER_BYTES, ShardError, read_header
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


def missing(directory: str | os.PathLike[str], train_shards: int) -> list[str]:
    """Lists the files that `fineweb` would download.

    Args:
      directory: folder of the shards.
      train_shards: 1 to 103.

    Returns:
      Names, validation first: what is not there, cut short, or damaged. Every token of a file is
      read the first time; `data_pipeline.checks` remembers what it found.

    Raises:
      ShardError: if `train_shards` is out of range.
    """
    if not 1 <= train_shards <= TRAIN_SHARDS:
        raise ShardError(f"train_shards={train_shards}: {REPOSITORY} has 1 to {TRAIN_SHARDS}.")
    return [name for name in _names(train_shards) if _damage(Path(directory) / name) is not None]


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
      ShardError: if `train_shards` is out of range, the disk has no room for what is missing, a
        file cannot be had, or is damaged after its download.
    """
    directory = Path(directory)
    wanted = missing(directory, train_shards)
    directory.mkdir(parents=True, exist_ok=True)
    _require_room(directory, wanted)
    for name in wanted:
        path = directory / name
        path.unlink(missing_ok=True)
        try:
            fetch(repo_id=REPOSITORY, filename=name, repo_type="dataset", local_dir=str(directory))
        except Exception as error:  # a connection that breaks half way is no OSError
            remedy = (
                "make room there"
                if getattr(error, "errno", None) == errno.ENOSPC
                else "see whether this machine reaches huggingface.co, or copy the file there"
            )
            raise ShardError(
                f"{path}: its download from {REPOSITORY} failed ({type(error).__name__}: "
                f"{error}); {remedy}, then repeat the command: complete files are kept."
            ) from error
        if damage := _damage(path):
            raise ShardError(
                f"{path}: damaged after its download: {damage}. Run the same command again, and "
                "see whether the disk is full if it stays so."
            )
    return [directory / name for name in _names(train_shards)]


def _names(train_shards: int) -> list[str]:
    numbers = range(1, train_shards + 1)
    return ["fineweb_val_000000.bin", *(f"fineweb_train_{n:06d}.bin" for n in numbers)]


def _damage(path: Path) -> str | None:
    """What is wrong with a file, None if it is a whole shard of GPT-2 tokens."""
    try:
        tokens = read_header(path)
    except ShardError as error:
        return str(error)
    last = path.name == f"fineweb_train_{TRAIN_SHARDS:06d}.bin"
    if tokens != SHARD_TOKENS and not last:  # only the last one may be short
        return f"{tokens} tokens instead of {SHARD_TOKENS}"
    facts = scan(path)
    if facts.highest >= GPT2_VOCAB_SIZE:
        return f"token {facts.highest} at position {facts.highest_at} is none of GPT-2's"
    return None if facts.hole_at < 0 else f"one token again and again from position {facts.hole_at}"


def _require_room(directory: Path, names: list[str]) -> None:
    """Refuses a download that the disk has no room for; files to be replaced count as room."""
    there = sum(path.stat().st_size for name in names if (path := directory / name).exists())
    needed = len(names) * shard_bytes() - there
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ShardError(
            f"{directory}: {len(names)} shards to download need {needed / 1e9:.1f} GB, the disk "
            f"has {free / 1e9:.1f} GB left; make room, or choose a folder elsewhere."
        )


def shard_bytes() -> int:
    """Size of the file of a full shard."""
    return HEADER_BYTES + 2 * SHARD_TOKENS
