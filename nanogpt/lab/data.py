"""Makes a folder of token shards: nanogpt data {sotu,folder,fineweb} --help."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from nanogpt.config.presets import preset
from nanogpt.lab.command import command

if TYPE_CHECKING:
    from data_pipeline import Manifest

# `data_pipeline` loads data by Grain, which imports jax: no help should wait for that.
DEMO = preset("cpu", "adamw")


@dataclasses.dataclass(frozen=True)
class Sotu:
    """US presidents' annual messages, 2.4 million GPT-2 tokens; needs no network."""

    directory: Path = Path(DEMO.data.directory)  # folder to write
    vocab_size: int = DEMO.model.vocab_size  # ids of the tokenizer: 257 to 50257
    val_tokens: int = DEMO.data.val_tokens  # validation tokens that the count models score

    def run(self) -> "Manifest":
        """Prepares the corpus."""
        from data_pipeline import gpt2, prepare, sotu
        from nanogpt.lab.preset_data import keep_vocabulary

        if self.directory == Path(DEMO.data.directory):
            keep_vocabulary(self.directory, self.vocab_size, DEMO.model.vocab_size)
        return prepare(sotu(), self.directory, gpt2(self.vocab_size), val_tokens=self.val_tokens)


@dataclasses.dataclass(frozen=True)
class Folder:
    """Your own .txt and .jsonl files."""

    path: tyro.conf.Positional[Path]  # folder of .txt and .jsonl files, searched recursively
    directory: Path = Path("data/folder")  # folder to write
    vocab_size: int = DEMO.model.vocab_size  # ids of the tokenizer: 257 to 50257
    val_tokens: int | None = None  # as many as the run's data.val_tokens; default: preset cpu's

    def run(self) -> "Manifest":
        """Prepares the corpus."""
        from data_pipeline import folder, gpt2, prepare

        corpus, tokenizer = folder(self.path), gpt2(self.vocab_size)
        manifest = prepare(corpus, self.directory, tokenizer, val_tokens=self.val_tokens)
        if self.val_tokens is not None:
            return manifest
        fitting = fitting_val_tokens(manifest.val[0].tokens)
        return prepare(corpus, self.directory, tokenizer, val_tokens=fitting or None)


@dataclasses.dataclass(frozen=True)
class Fineweb:
    """The benchmark's data from the Hugging Face hub, 200 MB a shard; can be interrupted."""

    directory: Path = Path("data/fineweb10B")  # folder to write; where preset track3 reads
    shards: int = 18  # training shards, 1 to 103; 18 are enough for 3375 steps of track 3

    def run(self) -> "Manifest":
        """Downloads what is missing and counts n-grams, some minutes for 18 shards."""
        from data_pipeline import describe, fineweb, gpt2
        from data_pipeline.download import SOURCE, VAL_TOKENS

        fineweb(self.directory, self.shards)
        manifest = describe(self.directory, SOURCE, gpt2(), VAL_TOKENS)
        manifest.write(self.directory)
        return manifest


Command = (
    Annotated[Sotu, tyro.conf.subcommand("sotu")]
    | Annotated[Folder, tyro.conf.subcommand("folder")]
    | Annotated[Fineweb, tyro.conf.subcommand("fineweb")]
)


def fitting_val_tokens(held_out: int) -> int:
    """Returns how many of so many held-out tokens a run of preset cpu can score.

    >>> fitting_val_tokens(10**6), fitting_val_tokens(5000), fitting_val_tokens(2048)
    (65536, 4096, 0)
    """
    batch = DEMO.data.microbatch_rows * DEMO.model.sequence_length
    return min(DEMO.data.val_tokens, (held_out - 1) // batch * batch)


def summary(manifest: "Manifest") -> str:
    """A few lines about a prepared folder."""
    counts = manifest.baselines
    val_tokens = sum(shard.tokens for shard in manifest.val)
    return "\n".join(
        [
            f"{manifest.source.corpus} {manifest.source.version}: {manifest.documents:,} documents",
            f"  train {manifest.train_tokens:,} tokens in {len(manifest.train)} shard(s), "
            f"val {val_tokens:,}; vocabulary {manifest.source.vocab_size:,}",
            f"  on {counts.val_tokens:,} val tokens ({counts.bytes_per_token:.3f} bytes each), "
            "nats per token:",
            f"  uniform {math.log(manifest.source.vocab_size):.4f}, unigram {counts.unigram:.4f}, "
            f"bigram {counts.bigram:.4f} ({counts.bits_per_byte(counts.bigram):.4f} bits per byte)",
        ]
    )


@command(OSError, stopped="stopped; the same command goes on or starts again")
def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    corpus: Sotu | Folder | Fineweb = tyro.cli(
        Command, prog="nanogpt data", description=__doc__, args=arguments
    )
    print(f"{corpus.directory}\n{summary(corpus.run())}")
