"""Batches of token rows from shards, as checkpointable Grain iterators.

Row k of a shard is tokens[kT : kT + T + 1]: T inputs and, one further, T targets. Rows never
cross shards. `sequential` reads them in order, once, as the track-3 benchmark does; `shuffled`
draws them in an order made from seed and epoch, for ever. In both, a rank's batch number s is its
slice of global batch s, so a step number alone restores the position
(`grain.experimental.set_next_index`), also with another number of ranks.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import grain
import numpy as np

from data_pipeline.shards import ShardError, Tokens, open_tokens, read_header

Mode = Literal["sequential", "shuffled"]
PathLike = str | os.PathLike[str]

# Batches that one thread reads ahead; reading tokens is far too cheap for worker processes.
_PREFETCH = 8
_PROBE_TOKENS = 4096


class Batch(TypedDict):
    """int32 (rows, sequence_length) each; targets[i, j] is the token after inputs[i, j]."""

    inputs: np.ndarray
    targets: np.ndarray


def train_batches(
    paths: Sequence[PathLike],
    *,
    sequence_length: int,
    batch_rows: int,
    mode: Mode,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Iterates over one rank's part of the training batches.

    Args:
      paths: shards, in reading order.
      sequence_length: tokens in a row, T.
      batch_rows: rows in one step, over all ranks.
      mode: "sequential" or "shuffled".
      seed: order of the rows in mode shuffled.
      rank: this process; it gets rows [rank, rank + 1) * batch_rows / world of each batch.
      world: number of processes.

    Returns:
      Iterator of `Batch` with batch_rows / world rows. It ends with the data in mode sequential.
      Its state can be saved with `grain.checkpoint.CheckpointSave`. Close it after use.

    Raises:
      ValueError: if a setting is impossible.
      ShardError: if a shard is damaged or smaller than one batch.
    """
    rows = _local_rows(sequence_length, batch_rows, rank, world)
    counts = _items(paths, sequence_length, batch_rows, mode)
    read_options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)
    if mode == "sequential":
        # An item is this rank's part of a whole batch.
        stride = batch_rows * sequence_length
        offset, length = rank * rows * sequence_length, rows * sequence_length + 1
        flat = grain.MapDataset.source(_Spans(paths, counts, stride, offset, length))
        dataset = flat.map(lambda tokens: _from_flat(tokens, sequence_length))
    else:
        # An item is a row. Batches are made before ranks take their turns: ranks together read
        # the same rows whatever their number.
        row = grain.MapDataset.source(
            _Spans(paths, counts, stride=sequence_length, offset=0, length=sequence_length + 1)
        )
        batches = row.shuffle(seed).repeat(None).batch(rows, drop_remainder=True)
        dataset = batches[rank::world].map(_from_rows)
    return iter(dataset.to_iter_dataset(read_options))


def needed_shards(
    paths: Sequence[PathLike], *, sequence_length: int, batch_rows: int, steps: int, mode: Mode
) -> list[PathLike]:
    """Chooses the shards that a run reads; refuses one that would run out of data.

    Call it before anything is compiled. Shards that are not needed may come and go between a run
    and its resumption.

    Args:
      paths: shards, in reading order.
      sequence_length: tokens in a row.
      batch_rows: rows in one step, over all ranks.
      steps: optimizer steps.
      mode: "sequential" (one pass) or "shuffled" (repeats, so any number of steps will do).

    Returns:
      The first of `paths`, as many as `steps` batches take; all of them in mode shuffled.

    Raises:
      ValueError: if a setting is impossible.
      ShardError: if a shard is damaged or smaller than one batch, or if mode is sequential and
        the shards hold fewer than `steps` batches.
    """
    _local_rows(sequence_length, batch_rows, rank=0, world=1)
    counts = _items(paths, sequence_length, batch_rows, mode)
    if mode == "shuffled":
        return list(paths)
    batches = int(counts.sum())
    if batches < steps:
        more = -(-(steps - batches) // int(counts.max()))
        raise ShardError(
            f"{Path(paths[0]).parent}: its {len(paths)} training shard(s) hold {batches} batches "
            f"of {batch_rows} x {sequence_length} tokens, but the run takes {steps} steps; add "
            f"{more} shard(s) like these (for FineWeb: `nanogpt data fineweb "
            f"--shards {len(paths) + more}`), lower the steps, or read them repeatedly with "
            "mode=shuffled."
        )
    return list(paths[: int(np.searchsorted(np.cumsum(counts), steps)) + 1])


def val_batches(
    path: PathLike | Tokens,
    *,
    sequence_length: int,
    val_tokens: int,
    rows: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Iterates over one rank's part of the first `val_tokens` predictions of a shard.

    All batches have the same shape: the sum of their losses over `val_tokens` is the mean.

    Args:
      path: the validation shard; opened before, it is refused once it has changed.
      sequence_length: tokens in a row.
      val_tokens: predictions scored; a multiple of rows * sequence_length.
      rows: rows in one batch, over all ranks.
      rank: this process; it gets rows [rank, rank + 1) * rows / world of each batch.
      world: number of processes.

    Returns:
      Iterator of val_tokens / (rows * sequence_length) batches of rows / world rows.

    Raises:
      ValueError: if a setting is impossible.
      ShardError: if the shard is damaged or has not more than `val_tokens` tokens.
    """
    local = _local_rows(sequence_length, rows, rank, world)
    stride = rows * sequence_length
    if val_tokens < 1 or val_tokens % stride:
        nearest = max(1, round(val_tokens / stride)) * stride
        raise ValueError(
            f"val_tokens={val_tokens} is not a positive multiple of {rows} rows of "
            f"{sequence_length} tokens; the nearest is {nearest}."
        )
    tokens = path if isinstance(path, Tokens) else open_tokens(path)
    if tokens.size <= val_tokens:
        fitting = (tokens.size - 1) // stride * stride
        remedy = (
            f"lower it to {fitting} or hold out more text (--data.val-tokens {fitting}, and "
            f"nanogpt data with --val-tokens {fitting})."
            if fitting
            else f"one batch of {rows} x {sequence_length} needs {stride + 1}: hold out more text "
            "or lower --data.microbatch-rows."
        )
        raise ShardError(
            f"{tokens.path}: {tokens.size} tokens, but val_tokens={val_tokens} needs "
            f"{val_tokens + 1}; {remedy}"
        )
    first, length = rank * local * sequence_length, local * sequence_length + 1
    starts = range(first, val_tokens, stride)
    return (_from_flat(tokens[s : s + length], sequence_length) for s in starts)


def fingerprint(paths: Sequence[PathLike], **settings: Any) -> str:
    """Identifies a stream of batches, to be compared before a run goes on from a checkpoint.

    Args:
      paths: shards, in reading order.
      **settings: whatever else decides the batches: sequence_length, batch_rows, mode, seed. Not
        rank and world, which may change.

    Returns:
      sha256 (hex) of the settings and of every shard's name, size, and first and last tokens.

    Raises:
      ShardError: if a shard is damaged.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in paths:
        tokens = open_tokens(path)
        digest.update(f"{Path(path).name} {tokens.size} ".encode())
        digest.update(tokens[:_PROBE_TOKENS].tobytes() + tokens[-_PROBE_TOKENS:].tobytes())
    return digest.hexdigest()


def _items(
    paths: Sequence[PathLike], sequence_length: int, batch_rows: int, mode: Mode
) -> np.ndarray:
    """Counts the batches (sequential) or rows (shuffled) of each shard: int64 (shards,).

    The benchmark leaves a shard of N tokens when the next batch of B would end at N - 1 or later,
    although N - 1 would do, so it takes floor((N - 2) / B). It does not look at a shard's size
    when it enters any but the first: one of B + 1 tokens then gives a batch after all.
    """
    if not paths:
        raise ShardError("paths is empty: name at least one training shard.")
    batch = batch_rows * sequence_length
    sizes = np.array([read_header(path) for path in paths], dtype=np.int64)
    for path, size in zip(paths, sizes, strict=True):
        if size <= batch:
            raise ShardError(
                f"{path}: {size} tokens, less than the {batch + 1} that one batch of "
                f"{batch_rows} x {sequence_length} needs; lower batch_rows or remove this shard."
            )
    if mode == "shuffled":
        return (sizes - 1) // sequence_length
    if mode != "sequential":
        raise ValueError(f"mode={mode!r}: choose 'sequential' or 'shuffled'.")
    counts = (sizes - 2) // batch
    counts[1:] = np.maximum(counts[1:], 1)
    return counts


def _local_rows(sequence_length: int, rows: int, rank: int, world: int) -> int:
    """Rows per rank, once every setting is known to be possible."""
    for name, value in (("sequence_length", sequence_length), ("rows of a batch", rows)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1.")
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank}: must be in 0..{world - 1}, as world={world}.")
    if rows % world:
        raise ValueError(
            f"world={world} does not divide the {rows} rows of a batch: choose rows so."
        )
    return rows // world


def _from_flat(tokens: np.ndarray, sequence_length: int) -> Batch:
    """Splits (rows * T + 1,) tokens; each row ends where the next one begins."""
    wide = tokens.astype(np.int32)
    shape = (-1, sequence_length)
    return Batch(inputs=wide[:-1].reshape(shape), targets=wide[1:].reshape(shape))


def _from_rows(rows: np.ndarray) -> Batch:
    """Splits (rows, T + 1) tokens."""
    return Batch(inputs=rows[:, :-1].astype(np.int32), targets=rows[:, 1:].astype(np.int32))


class _Spans:
    """Random access to equally long spans of tokens, for Grain.

    Item i is the j-th span of its shard, tokens[offset + j * stride :][:length].
    """

    def __init__(
        self, paths: Sequence[PathLike], counts: np.ndarray, stride: int, offset: int, length: int
    ):
        self._shards = [open_tokens(path) for path in paths]
        self._ends = np.cumsum(counts)
        self._stride, self._offset, self._length = stride, offset, length

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[shard - 1]) if shard else 0
        start = self._offset + (int(index) - before) * self._stride
        return self._shards[shard][start : start + self._length]

    def __repr__(self) -> str:
        return f"_Spans({len(self)} of {self._length} tokens in {len(self._shards)} shards)"
