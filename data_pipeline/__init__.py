"""Text to token shards to batches: NumPy, Grain and tiktoken, no JAX."""

from data_pipeline.checks import check_shards
from data_pipeline.corpora import Corpus, CorpusError, Document, folder, sotu
from data_pipeline.download import fineweb, missing, shards_needed
from data_pipeline.loader import (
    Batch,
    fingerprint,
    needed_shards,
    train_batches,
    val_batches,
)
from data_pipeline.manifest import Manifest, Source, describe, read_manifest
from data_pipeline.ngrams import Baselines, baselines
from data_pipeline.packages import prose, reference
from data_pipeline.prepare import prepare
from data_pipeline.shards import (
    ShardError,
    open_tokens,
    read_header,
    shard_paths,
    write_shard,
)
from data_pipeline.tokenizer import Tokenizer, gpt2

__all__ = [
    "Baselines",
    "Batch",
    "Corpus",
    "CorpusError",
    "Document",
    "Manifest",
    "ShardError",
    "Source",
    "Tokenizer",
    "baselines",
    "check_shards",
    "describe",
    "fineweb",
    "fingerprint",
    "folder",
    "gpt2",
    "missing",
    "needed_shards",
    "open_tokens",
    "prepare",
    "prose",
    "read_header",
    "read_manifest",
    "reference",
    "shard_paths",
    "shards_needed",
    "sotu",
    "train_batches",
    "val_batches",
    "write_shard",
]
