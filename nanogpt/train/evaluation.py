"""The loss of a trained model on any shards, with its standard error."""

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import data_pipeline
from data_pipeline import Batch, ShardError
from nanogpt.model.loss import token_losses
from nanogpt.train.train_step import model_structure
from nanogpt.train.trained import Trained


class Evaluation(NamedTuple):
    """A loss on some text.

    Attributes:
        tokens: predictions scored.
        loss: nats per token, the mean over all rows.
        standard_error: of the loss, as if rows were drawn independently.
        bits_per_byte: nats / (ln 2 * bytes of the tokens' text).
        bits_standard_error: of these.
    """

    tokens: int
    loss: float
    standard_error: float
    bits_per_byte: float
    bits_standard_error: float


def evaluate(trained: Trained, shards: Sequence[Path], tokens: int | None = None) -> Evaluation:
    """Scores rows of the run's length, one after the other, no token twice.

    Args:
        trained: the model.
        shards: files of tokens of the run's tokenizer, see `shards_of`.
        tokens: how many predictions at most; None for all whole rows.

    Raises:
        ShardError: damaged shards, ids that the model's tokenizer does not have, or less than a
            row.
    """
    data_pipeline.check_shards(shards, trained.tokenizer.vocab_size)
    length, size = trained.config.model.sequence_length, trained.config.data.microbatch_rows
    rows = itertools.islice(_rows(shards, length), None if tokens is None else tokens // length)
    graphdef = model_structure(trained.config.model)

    @jax.jit
    def losses(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        raw_BxTxV = nnx.merge(graphdef, params).raw_logits(inputs)
        found = token_losses(raw_BxTxV.reshape(-1, raw_BxTxV.shape[-1]), targets.ravel())
        return found.reshape(targets.shape)

    sums, lengths = [], trained.tokenizer.token_bytes()
    seen = 0
    while piece := list(itertools.islice(rows, size)):
        batch = {k: np.concatenate([row[k] for row in piece]) for k in ("inputs", "targets")}
        seen += int(lengths[batch["targets"]].sum())
        # The last piece may have fewer rows: it is filled up, so that one program does.
        full = {k: np.resize(x, (size, length)) for k, x in batch.items()}
        found = np.asarray(losses(trained.params, **full), np.float64)[: len(piece)]
        sums.extend(found.sum(1))
    if not sums:
        raise ShardError(
            f"{shards[0]}: less than a row of {length} tokens: give more text, or a larger "
            "--tokens."
        )
    return _summary(np.array(sums), length, seen)


def _summary(sums: np.ndarray, length: int, seen: int) -> Evaluation:
    """Of the summed losses of rows of a length, whose targets stand for so many bytes."""
    count = len(sums) * length
    loss = sums.sum() / count
    error = sums.std(ddof=1) / length / math.sqrt(len(sums)) if len(sums) > 1 else math.nan
    bits = count / (math.log(2) * seen) if seen else math.nan  # ends of texts have no bytes
    return Evaluation(count, float(loss), float(error), float(loss * bits), float(error * bits))


def _rows(shards: Iterable[Path], length: int) -> Iterator[Batch]:
    for path in shards:
        whole = (data_pipeline.open_tokens(path).size - 1) // length * length
        if whole:
            sizes = {"sequence_length": length, "val_tokens": whole, "rows": 1}
            yield from data_pipeline.val_batches(path, **sizes)


def shards_of(data: Sequence[str], trained: Trained) -> list[Path]:
    """The files that a user names: shards, or folders, of which the validation shards are meant.

    Args:
        data: paths.
        trained: whose tokenizer the folders' manifests must name.

    Raises:
        ShardError: no such file, no validation shards, or another vocabulary.
    """
    found = []
    for place in map(Path, data):
        folder = place if place.is_dir() else place.parent
        found += data_pipeline.shard_paths(place, "val") if place.is_dir() else [place]
        if os.path.exists(folder / "manifest.json"):
            size = data_pipeline.read_manifest(folder).source.vocab_size
            if size != trained.tokenizer.vocab_size:
                raise ShardError(
                    f"{folder}: made with a vocabulary of {size}, the run with one of "
                    f"{trained.tokenizer.vocab_size}: prepare the text with --vocab-size "
                    f"{trained.tokenizer.vocab_size}."
                )
    return found
