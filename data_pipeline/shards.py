"""Token shards on disk, in the format of the track-3 benchmark.

A shard is 256 little-endian int32 (magic, version, token count, zeros) followed by the tokens as
little-endian uint16. Nothing else is in the file, so its size is known from its header.
"""

import functools
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024

_REMAKE = "delete it and prepare or download it again (nanogpt data)"


class ShardError(ValueError):
    """A shard, or a set of shards, that a run must not start with."""


def read_header(path: str | os.PathLike[str]) -> int:
    """Reads and checks the header of a shard.

    Args:
      path: the shard.

    Returns:
      The number of tokens in it.

    Raises:
      ShardError: if the file is missing or empty, if magic or version differ from the format's,
        or if the file's size is not exactly what its header announces.
    """
    path = Path(path)
    if not path.is_file():
        raise ShardError(f"{path}: no such file; {_REMAKE}.")
    header = np.fromfile(path, dtype="<i4", count=HEADER_BYTES // 4)
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise ShardError(
            f"{path}: {size} bytes, shorter than the {HEADER_BYTES} of a header; {_REMAKE}."
        )
    magic, version, count = (int(value) for value in header[:3])
    if magic != MAGIC:
        raise ShardError(
            f"{path}: magic number {magic}, expected {MAGIC}: not a token shard; {_REMAKE}."
        )
    if version != VERSION:
        raise ShardError(
            f"{path}: format version {version}, this program reads {VERSION}; {_REMAKE}."
        )
    expected = HEADER_BYTES + 2 * count
    if count < 1 or size != expected:
        raise ShardError(
            f"{path}: {size} bytes, but its header announces {count} tokens ({expected} bytes); "
            f"{_REMAKE}."
        )
    return count


class Tokens:
    """The tokens of a shard: `tokens[10:20]` is uint16 (10,), read from the file at that moment.

    A shard that has changed since is refused: what was checked is not what is read. (A memory map
    would end the process without a word where the file has become shorter.)

    Attributes:
      path: the shard.
      size: its number of tokens.

    Raises:
      ShardError: as `read_header`; by a read, if the file has changed.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self.size = str(path), read_header(path)
        self._known = _size_and_time(self.path)

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.size)
        found = np.empty(max(0, stop - start), "<u2")
        same = _size_and_time(self.path) == self._known
        if not same or _fill(found, self._file, HEADER_BYTES + 2 * start) < found.nbytes:
            raise ShardError(
                f"{self.path}: was changed while it was read; put the file back, or prepare the "
                "text again, and go on with --resume."
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    @functools.cached_property
    def _file(self) -> int:
        file = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, file)
        return file


def open_tokens(path: str | os.PathLike[str]) -> Tokens:
    """Opens a shard, to read parts of it; errors as in `read_header`."""
    return Tokens(path)


def _fill(found: np.ndarray, file: int, offset: int) -> int:
    """Reads bytes at an offset into an array; returns how many there were."""
    view, done = found.data.cast("B"), 0
    while done < len(view) and (count := os.preadv(file, [view[done:]], offset + done)):
        done += count
    return done


def _size_and_time(path: str) -> tuple[int, int]:
    """Tells whether a file is still the same; one that has gone has neither."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def write_shard(path: str | os.PathLike[str], tokens: np.ndarray) -> None:
    """Writes a shard atomically: a reader sees the whole file or none.

    Args:
      path: file to create or replace; its folder must exist.
      tokens: uint16 (tokens,), at least one.

    Raises:
      ShardError: if `tokens` has another dtype or rank, or is empty.
    """
    if tokens.dtype != np.uint16 or tokens.ndim != 1 or not tokens.size:
        raise ShardError(
            f"{path}: tokens are {tokens.dtype} of shape {tokens.shape}; "
            "pass a non-empty uint16 vector."
        )
    path = Path(path)
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(header.tobytes())
            file.write(tokens.astype("<u2", copy=False).tobytes())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def shard_paths(directory: str | os.PathLike[str], split: str) -> list[Path]:
    """Lists the shards of a split in reading order.

    Args:
      directory: folder of shards.
      split: "train" or "val".

    Returns:
      The files `*_{split}_*.bin`, sorted by name; at least one.

    Raises:
      ShardError: if there is none.
    """
    paths = sorted(Path(directory).glob(f"*_{split}_*.bin"))
    if not paths:
        raise ShardError(
            f"{directory}: no *_{split}_*.bin shard; prepare one with "
            f"`nanogpt data` or name another folder."
        )
    return paths
