"""From documents to a folder of shards and its manifest."""

import os
import tempfile
from pathlib import Path

import numpy as np

from data_pipeline.corpora import Corpus
from data_pipeline.manifest import FILE_NAME, Manifest, Source, describe, read_manifest
from data_pipeline.shards import ShardError, write_shard
from data_pipeline.tokenizer import Tokenizer


def prepare(
    corpus: Corpus,
    directory: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    val_tokens: int | None = None,
    shard_tokens: int = 10**8,
) -> Manifest:
    """Writes `{corpus}_{split}_{number}.bin` shards and manifest.json; nothing if they are there.

    Each document is preceded by one end-of-text token; documents run on from shard to shard.
    Shards appear in `directory` only when all of them, and the manifest, are made. Shards of an
    earlier preparation are replaced, others are not touched.

    Args:
      corpus: the text.
      directory: folder to create or update.
      tokenizer: the encoding.
      val_tokens: predictions that the manifest's baselines score; None for all.
      shard_tokens: tokens in a full shard; the last two of a split share what is left.

    Returns:
      The manifest.

    Raises:
      ValueError: if `val_tokens` is below 1.
      CorpusError: if the text cannot be read.
      ShardError: if the folder holds shards of unknown origin, if a split is empty, or if
        validation has not more than `val_tokens` tokens.
    """
    if val_tokens is not None and val_tokens < 1:
        raise ValueError(f"val_tokens={val_tokens}: must be at least 1; None scores all.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    source = Source(
        corpus=corpus.name,
        version=corpus.version,
        licence=corpus.licence,
        split_rule=corpus.split_rule,
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        shard_tokens=shard_tokens,
    )
    old = read_manifest(directory) if (directory / FILE_NAME).exists() else None
    _refuse_strangers(directory, old)
    if old and old.source == source and old.is_intact(directory):
        if val_tokens in (None, old.baselines.val_tokens):
            return old
        manifest = describe(directory, source, tokenizer, val_tokens)
    else:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".partial-") as partial:
            _write_shards(corpus, Path(partial), tokenizer, shard_tokens)
            manifest = describe(partial, source, tokenizer, val_tokens)
            _replace_shards(directory, old, Path(partial))
    manifest.write(directory)
    return manifest


def _refuse_strangers(directory: Path, manifest: Manifest | None) -> None:
    """Raises if the folder has shards that no manifest lists: a run would read them too."""
    ours = {shard.file for shard in manifest.train + manifest.val} if manifest else set()
    strangers = sorted({path.name for path in directory.glob("*.bin")} - ours)
    if strangers:
        raise ShardError(
            f"{directory}: holds {strangers[0]} ({len(strangers)} such file(s)), which its "
            "manifest does not list; choose another folder or move them away."
        )


def _write_shards(corpus: Corpus, directory: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
    writers = {
        "train": _SplitWriter(directory, f"{corpus.name}_train", 1, shard_tokens),
        "val": _SplitWriter(directory, f"{corpus.name}_val", 0, shard_tokens),
    }
    end_of_text = np.array([tokenizer.end_of_text], dtype=np.uint16)
    for document in corpus.documents():
        writers[document.split].add(end_of_text)
        writers[document.split].add(tokenizer.encode(document.text))
    for writer in writers.values():
        writer.close()


def _replace_shards(directory: Path, old: Manifest | None, new: Path) -> None:
    """Moves shards in. Without its manifest the folder is never taken for a prepared one."""
    if old:
        (directory / FILE_NAME).unlink()
        for shard in old.train + old.val:
            (directory / shard.file).unlink(missing_ok=True)
    for path in sorted(new.glob("*.bin")):
        path.replace(directory / path.name)


class _SplitWriter:
    """Cuts a stream of tokens into shards, none of them shorter than half a full one.

    A short last shard would be refused by the loader, or its batches lost; so twice the size is
    held back, and what is left at the end is halved.
    """

    def __init__(self, directory: Path, stem: str, number: int, shard_tokens: int):
        self._directory, self._stem, self._number = directory, stem, number
        self._size = shard_tokens
        self._held: list[np.ndarray] = []
        self._held_tokens = 0

    def add(self, tokens: np.ndarray) -> None:
        self._held.append(tokens)
        self._held_tokens += tokens.size
        while self._held_tokens >= 2 * self._size:
            self._write(self._size)

    def close(self) -> None:
        if self._held_tokens > self._size:
            self._write(self._held_tokens // 2)
        if self._held_tokens:
            self._write(self._held_tokens)

    def _write(self, count: int) -> None:
        tokens = np.concatenate(self._held)
        write_shard(self._directory / f"{self._stem}_{self._number:06d}.bin", tokens[:count])
        self._number += 1
        self._held, self._held_tokens = [tokens[count:]], tokens.size - count
