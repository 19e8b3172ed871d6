"""manifest.json: contents of a folder of shards, their origin, and their n-gram baselines."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

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


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file: its name, tokens, documents that begin in it, and sha256 (hex)."""

    file: str
    tokens: int
    documents: int
    sha256: str


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
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{path}: not a manifest of this version ({error!r}); delete it and prepare the "
            "folder again."
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
    documents = int(np.count_nonzero(tokens == tokenizer.end_of_text))
    return Shard(path.name, tokens.size, documents, _sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
