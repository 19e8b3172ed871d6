"""Whether shards are what they should be, found out once and remembered beside them."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.shards import HEADER_BYTES, ShardError, open_tokens

FILE_NAME = "checked.json"
_SCAN_TOKENS = 1 << 24
# A page of a file: what a disk or an interrupted download leaves empty has at least this size.
_HOLE_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a scan of all tokens of a shard found.

    Attributes:
      size: of the file in bytes, and
      modified: its time of change in ns; with others the facts are not about this file.
      highest: largest token.
      highest_at: where it first is.
      hole_at: where a stretch of 2048 equal tokens begins, -1 if there is none.
      sha256: of the whole file (hex).
    """

    size: int
    modified: int
    highest: int
    highest_at: int
    hole_at: int
    sha256: str

    def __post_init__(self):
        """Refuses what another program may have written into checked.json."""
        numbers = (self.size, self.modified, self.highest, self.highest_at, self.hole_at)
        if {type(n) for n in numbers} != {int} or type(self.sha256) is not str:
            raise TypeError(f"{self} is no result of a scan")


def scan(path: str | os.PathLike[str]) -> Facts:
    """Reads every token of a shard, unless checked.json beside it says that this has been done.

    Args:
      path: the shard.

    Returns:
      What was found. It is remembered where the folder can be written.

    Raises:
      ShardError: as `read_header`.
    """
    path = Path(path)
    tokens, status = open_tokens(path), path.stat()
    known = _remembered(path.parent).get(path.name)
    if known and (known.size, known.modified) == (status.st_size, status.st_mtime_ns):
        return known
    highest, highest_at, hole_at = -1, 0, -1
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(HEADER_BYTES))
    for start in range(0, tokens.size, _SCAN_TOKENS):
        chunk = tokens[start : start + _SCAN_TOKENS]
        digest.update(chunk.data)
        if chunk.max() > highest:
            highest_at = start + int(chunk.argmax())
            highest = int(chunk.max())
        if hole_at < 0 and (holes := _holes(chunk)).size:
            hole_at = start + int(holes[0])
    place = (status.st_size, status.st_mtime_ns)
    facts = Facts(*place, highest, highest_at, hole_at, digest.hexdigest())
    _remember(path, facts)
    return facts


def check_shards(paths: Sequence[str | os.PathLike[str]], vocab_size: int) -> int:
    """Checks headers, sizes and the range of every token, before a run starts.

    Args:
      paths: the shards.
      vocab_size: rows of the model's embedding; every token must be smaller.

    Returns:
      The number of tokens in all shards together.

    Raises:
      ShardError: as `read_header`, or if a token is not in the vocabulary.
    """
    total = 0
    for path in paths:
        facts = scan(path)
        if facts.highest >= vocab_size:
            raise ShardError(
                f"{path}: token {facts.highest} at position {facts.highest_at} is outside the "
                f"model's vocabulary of {vocab_size}; raise the model's vocab_size or "
                "prepare the data with a smaller one."
            )
        total += open_tokens(path).size
    return total


def _holes(chunk: np.ndarray) -> np.ndarray:
    """Beginnings of the whole stretches of `_HOLE_TOKENS` equal tokens, at multiples of that."""
    pages = chunk[: chunk.size // _HOLE_TOKENS * _HOLE_TOKENS].reshape(-1, _HOLE_TOKENS)
    same = np.flatnonzero(pages[:, 0] == pages[:, -1])  # nearly all are out already
    return same[(pages[same] == pages[same, :1]).all(axis=1)] * _HOLE_TOKENS


def _remembered(directory: Path) -> dict[str, Facts]:
    """The facts in checked.json by file name; none if it is missing or not ours."""
    if not (directory / FILE_NAME).is_file():  # nor a pipe, of which reading has no end
        return {}
    try:
        fields = json.loads((directory / FILE_NAME).read_text(encoding="utf-8"))
        return {name: Facts(**facts) for name, facts in fields.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _remember(path: Path, facts: Facts) -> None:
    """Adds a file's facts to checked.json, atomically; a folder that is read-only stays so."""
    known = _remembered(path.parent) | {path.name: facts}
    partial = path.with_name(f".{FILE_NAME}.{os.getpid()}")
    text = json.dumps({name: dataclasses.asdict(known[name]) for name in sorted(known)}, indent=1)
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path.with_name(FILE_NAME))
    except OSError:
        partial.unlink(missing_ok=True)
