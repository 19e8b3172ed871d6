"""Makes a folder of token shards: nanogpt data {sotu,prose,reference,folder,fineweb} --help."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from nanogpt.config.presets import preset
from nanogpt.config.run import check_folders
from nanogpt.lab.command import command

# `data_pipeline` loads data by Grain, which imports jax: no help should wait for that.
DEMO = preset("cpu", "adamw")
BOARD = preset("board", "adamw").model


def sotu(
    directory: str = DEMO.data.directory,
    vocab_size: int = DEMO.model.vocab_size,
    val_tokens: int = DEMO.data.val_tokens,
) -> None:
    """US presidents' annual messages, 2.4 million GPT-2 tokens; needs no network.

    Args:
        directory: folder to write
        vocab_size: ids of the tokenizer: 257 to 50257
        val_tokens: validation tokens that the count models score
    """
    from data_pipeline import gpt2, prepare, sotu
    from nanogpt.lab.preset_data import keep_vocabulary

    check_folders(directory=directory)
    if Path(directory) == Path(DEMO.data.directory):
        keep_vocabulary(directory, vocab_size, DEMO.model.vocab_size)
    prepare(sotu(), directory, gpt2(vocab_size), val_tokens=val_tokens)
    tell(directory)


def prose(
    directory: str = "data/prose", vocab_size: int = BOARD.vocab_size, val_tokens: int = 65536
) -> None:
    """Encyclopedia and older prose, 8 million GPT-2 tokens, of packages of pip and Debian.

    Args:
        directory: folder to write
        vocab_size: ids of the tokenizer; the default is that of preset board
        val_tokens: validation tokens that the count models score
    """
    from data_pipeline import prose

    _of_packages(prose, directory, vocab_size, val_tokens)


def reference(
    directory: str = "data/reference", vocab_size: int = BOARD.vocab_size, val_tokens: int = 65536
) -> None:
    """Reference documentation of web services, 5 million GPT-2 tokens, of one package of pip.

    Args:
        directory: folder to write
        vocab_size: ids of the tokenizer; the default is that of preset board
        val_tokens: validation tokens that the count models score
    """
    from data_pipeline import reference

    _of_packages(reference, directory, vocab_size, val_tokens)


def _of_packages(
    corpus: Callable[[], Any], directory: str, vocab_size: int, val_tokens: int
) -> None:
    from data_pipeline import gpt2, prepare

    check_folders(directory=directory)
    prepare(corpus(), directory, gpt2(vocab_size), val_tokens=val_tokens)
    tell(directory)


def folder(
    path: tyro.conf.Positional[Path],
    directory: str = "data/folder",
    vocab_size: int = DEMO.model.vocab_size,
    val_tokens: int | None = None,
) -> None:
    """Your own .txt and .jsonl files.

    Args:
        path: folder of .txt and .jsonl files, searched recursively
        directory: folder to write
        vocab_size: ids of the tokenizer: 257 to 50257
        val_tokens: as many as the run's data.val_tokens; default: preset cpu's
    """
    from data_pipeline import folder, gpt2, prepare

    check_folders(directory=directory)
    corpus, tokenizer = folder(path), gpt2(vocab_size)
    manifest = prepare(corpus, directory, tokenizer, val_tokens=val_tokens)
    if val_tokens is None:
        fitting = fitting_val_tokens(manifest.val[0].tokens)
        prepare(corpus, directory, tokenizer, val_tokens=fitting or None)
    tell(directory)


def fineweb(directory: str = "data/fineweb10B", shards: int = 18) -> None:
    """The benchmark's data from the Hugging Face hub, 200 MB a shard; can be interrupted.

    Then it counts n-grams, some minutes for 18 shards.

    Args:
        directory: folder to write; preset track3 reads the default
        shards: training shards, 1 to 103; 18 are enough for 3375 steps of track 3
    """
    from data_pipeline import describe, fineweb, gpt2
    from data_pipeline.download import SOURCE, VAL_TOKENS

    check_folders(directory=directory)
    fineweb(directory, shards)
    describe(directory, SOURCE, gpt2(), VAL_TOKENS).write(directory)
    tell(directory)


def fitting_val_tokens(held_out: int) -> int:
    """Returns how many of so many held-out tokens a run of preset cpu can score.

    >>> fitting_val_tokens(10**6), fitting_val_tokens(5000), fitting_val_tokens(2048)
    (65536, 4096, 0)
    """
    batch = DEMO.data.microbatch_rows * DEMO.model.sequence_length
    return min(DEMO.data.val_tokens, (held_out - 1) // batch * batch)


def tell(directory: str) -> None:
    """Prints a few lines about a prepared folder."""
    from data_pipeline import read_manifest

    manifest = read_manifest(directory)
    counts, source = manifest.baselines, manifest.source
    print(
        f"{directory}\n"
        f"{source.corpus} {source.version}: {manifest.documents:,} documents\n"
        f"  train {manifest.train_tokens:,} tokens in {len(manifest.train)} shard(s), "
        f"val {sum(shard.tokens for shard in manifest.val):,}; vocabulary {source.vocab_size:,}\n"
        f"  on {counts.val_tokens:,} val tokens ({counts.bytes_per_token:.3f} bytes each), "
        "nats per token:\n"
        f"  uniform {math.log(source.vocab_size):.4f}, unigram {counts.unigram:.4f}, "
        f"bigram {counts.bigram:.4f} ({counts.bits_per_byte(counts.bigram):.4f} bits per byte)"
    )


@command(stopped="stopped; the same command goes on or starts again")
def main(words: Sequence[str]) -> None:
    """Runs the command line."""
    known = (sotu, prose, reference, folder, fineweb)
    corpora = {corpus.__name__: corpus for corpus in known}
    tyro.extras.subcommand_cli_from_dict(
        corpora, prog="nanogpt data", description=__doc__, args=words
    )
