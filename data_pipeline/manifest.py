"""manifest.json: contents of a folder of shards, their origin, and their n-gram baselines."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from data_pipeline.checks import scan
from data_pipeline.ngrams import Baselines, baselines
from data_pipeline.shards import ShardError, open_tokens, shard_paths
from data_pipeline.tokenizer import MERGES_SHA256, Tokenizer

FILE_NAME = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Source:
    """Everything that decides the tokens. Equal sources, equal shards.

    Attributes:
      corpus: name of the corpus.
      version: of the corpus.
      licence: of its text.
      split_rule: how validation text is held out.
      tokenizer: name of the encoding.
      vocab_size: ids in it, end-of-text included.
      merges_sha256: of the merge table it is made from.
      shard_tokens: tokens in a full shard.
    """

    corpus: str
    version: str
    licence: str
    split_rule: str
    tokenizer: str
    vocab_size: int
    merges_sha256: str = MERGES_SHA256
    shard_tokens: int = 10**8

    def __post_init__(self):
        """Refuses values of other types, and a vocabulary that tokens of a shard cannot have."""
        sizes = (self.vocab_size, self.shard_tokens)
        names = [getattr(self, field.name) for field in dataclasses.fields(self)]
        if {type(size) for size in sizes} != {int} or not all(
            isinstance(name, str) for name in names if name not in sizes
        ):
            raise ValueError(f"{self}: vocab_size and shard_tokens must be numbers, the rest text.")
        if not 1 <= self.vocab_size <= 1 << 16 or self.shard_tokens < 1:
            raise ValueError(f"{self}: vocab_size must be in 1..65536, shard_tokens at least 1.")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file: its name, tokens, documents that begin in it, and sha256 (hex)."""

    file: str
    tokens: int
    documents: int
    sha256: str

    def __post_init__(self):
        """Refuses a path that leads out of the folder: files that a manifest names are deleted."""
        words = (self.file, self.sha256)
        if not all(type(word) is str for word in words) or Path(self.file).name != self.file:
            raise ValueError(f"{self}: file must be a bare name and sha256 text.")
        if not all(type(n) is int and n >= 0 for n in (self.tokens, self.documents)):
            raise ValueError(f"{self}: tokens and documents must be numbers.")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The folder's table of contents; the first validation shard is the one that is scored."""

    source: Source
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]
    baselines: Baselines

    @property
    def train_tokens(self) -> int:
        """Tokens of all training shards together."""
        return sum(shard.tokens for shard in self.train)

    @property
    def documents(self) -> int:
        """Documents of both splits together."""
        return sum(shard.documents for shard in self.train + self.val)

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Writes manifest.json into `directory`, atomically."""
        partial = Path(directory) / f".{FILE_NAME}.{os.getpid()}"
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        partial.replace(Path(directory) / FILE_NAME)

    def check(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        """Refuses shards that are not as they were made; a file is read once, then remembered.

        Args:
          paths: shards of this folder; those that are not listed pass.

        Raises:
          ShardError: names the first that is damaged.
        """
        made = {shard.file: shard.sha256 for shard in self.train + self.val}
        for path in map(Path, paths):
            found = scan(path).sha256
            if made.get(path.name, found) != found:
                raise ShardError(
                    f"{path}: sha256 {found[:12]}..., but {FILE_NAME} beside it tells "
                    f"{made[path.name][:12]}...: the file was changed since it was made. Delete "
                    "both and prepare the text again (nanogpt data)."
                )

    def is_intact(self, directory: str | os.PathLike[str]) -> bool:
        """Whether every listed shard is in `directory` with the listed content."""
        files = [(Path(directory) / shard.file, shard.sha256) for shard in self.train + self.val]
        return all(path.is_file() and _sha256(path) == digest for path, digest in files)


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Reads the manifest of a folder of shards.

    Args:
      directory: the folder.

    Returns:
      Its manifest.

    Raises:
      ShardError: if there is none, or it has other fields than this version writes.
    """
    path = Path(directory) / FILE_NAME
    if not path.is_file():
        raise ShardError(f"{path}: no such file; prepare the folder with `nanogpt data`.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(
            source=_checked(Source(**fields["source"])),
            train=tuple(_checked(Shard(**shard)) for shard in fields["train"]),
            val=tuple(_checked(Shard(**shard)) for shard in fields["val"]),
            baselines=_checked(Baselines(**fields["baselines"])),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(
            f"{path}: not a manifest of this version ({str(error)[:200]}); delete it and prepare "
            "the folder again."
        ) from None


def describe(
    directory: str | os.PathLike[str],
    source: Source,
    tokenizer: Tokenizer,
    val_tokens: int | None = None,
) -> Manifest:
    """Makes the manifest of a folder that holds training and validation shards.

    Args:
      directory: folder of shards.
      source: where they come from.
      tokenizer: the one that made them.
      val_tokens: predictions that the baselines score; None for all of the first validation shard.

    Returns:
      The manifest; it is not written.

    Raises:
      ShardError: if a split has no shard, a shard is damaged, or validation is too short.
    """
    train, val = shard_paths(directory, "train"), shard_paths(directory, "val")
    if val_tokens is None:
        val_tokens = open_tokens(val[0]).size - 1
    return Manifest(
        source=source,
        train=tuple(_shard(path, tokenizer) for path in train),
        val=tuple(_shard(path, tokenizer) for path in val),
        baselines=baselines(train, val[0], tokenizer, val_tokens),
    )


def _checked(part: Any) -> Any:
    """A part of a manifest whose values are of the types that it says."""
    for name, kind in get_type_hints(type(part)).items():
        if not isinstance(getattr(part, name), kind):
            raise TypeError(f"{name}={getattr(part, name)!r}")
    return part


def _shard(path: Path, tokenizer: Tokenizer) -> Shard:
    tokens = open_tokens(path)
    documents = int(np.count_nonzero(tokens[:] == tokenizer.end_of_text))
    return Shard(path.name, tokens.size, documents, _sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
