"""What counting alone can predict: the losses that a model has to beat.

Both models are fitted on the training shards and scored on the tokens that validation scores:

    unigram  p1(v)     = (count(v) + 1) / (tokens + vocab_size)       add-one: unseen ids get mass
    bigram   p2(v | u) = 0.7 count(u, v) / count(u) + 0.3 p1(v)       p1(v) where u is unseen
"""

import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np

from data_pipeline.shards import ShardError, open_tokens
from data_pipeline.tokenizer import Tokenizer

BIGRAM_WEIGHT = 0.7

_CHUNK_TOKENS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Losses of count models in nats per token, and the unit for bits per byte.

    Attributes:
      val_tokens: predictions that were scored: tokens 1..val_tokens of the validation shard.
      bytes_per_token: UTF-8 bytes of text per scored token.
      unigram: mean loss of the unigram model.
      bigram: mean loss of the interpolated bigram model.
    """

    val_tokens: int
    bytes_per_token: float
    unigram: float
    bigram: float

    def __post_init__(self):
        """Refuses what no text has; a manifest may have been changed by hand."""
        figures = (self.bytes_per_token, self.unigram, self.bigram)
        sound = all(isinstance(x, int | float) and math.isfinite(x) and x >= 0 for x in figures)
        if type(self.val_tokens) is not int or self.val_tokens < 1 or not sound:
            raise ValueError(f"{self}: val_tokens and losses must be positive numbers.")

    def bits_per_byte(self, loss: float) -> float:
        """Converts nats per token to bits per byte: loss / (ln 2 * bytes_per_token).

        >>> round(Baselines(1000, 4.0, 7.0, 5.0).bits_per_byte(math.log(16)), 6)
        1.0
        """
        return loss / (math.log(2) * self.bytes_per_token)


def baselines(
    train_paths: Sequence[str | os.PathLike[str]],
    val_path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    val_tokens: int,
) -> Baselines:
    """Scores the count models; memory grows with `val_tokens`, not with the training shards.

    Args:
      train_paths: shards that are counted, each a text of its own.
      val_path: shard whose first `val_tokens + 1` tokens are read.
      tokenizer: the one that made the shards.
      val_tokens: predictions to score.

    Returns:
      The losses and the bytes per token.

    Raises:
      ShardError: if a shard is damaged, has ids outside the tokenizer's vocabulary, or the
        validation shard is too short.
    """
    size = tokenizer.vocab_size
    val = open_tokens(val_path)
    if not 1 <= val_tokens < val.size:
        raise ShardError(
            f"{val_path}: val_tokens={val_tokens} does not fit in its {val.size} tokens; "
            f"choose 1 to {val.size - 1}."
        )
    scored = _ids(val[: val_tokens + 1], size, val_path)
    contexts, targets = scored[:-1], scored[1:]
    pairs, place = np.unique(contexts * size + targets, return_inverse=True)
    tokens, as_context, pair_counts = _count(train_paths, size, pairs)

    unigram = (tokens[targets] + 1) / (tokens.sum() + size)
    seen = as_context[contexts] > 0
    conditional = pair_counts[place] / np.maximum(as_context[contexts], 1)
    mixed = BIGRAM_WEIGHT * conditional + (1 - BIGRAM_WEIGHT) * unigram
    return Baselines(
        val_tokens=val_tokens,
        bytes_per_token=float(tokenizer.token_bytes()[targets].mean()),
        unigram=float(-np.log(unigram).mean()),
        bigram=float(-np.log(np.where(seen, mixed, unigram)).mean()),
    )


def _count(
    paths: Sequence[str | os.PathLike[str]], size: int, pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts ids, ids as contexts, and the given pairs (sorted keys u * size + v)."""
    counts, as_context = np.zeros(size, np.int64), np.zeros(size, np.int64)
    pair_counts = np.zeros(pairs.size, np.int64)
    for path in paths:
        tokens = open_tokens(path)
        for start in range(0, tokens.size, _CHUNK_TOKENS):
            chunk = _ids(tokens[start : start + _CHUNK_TOKENS + 1], size, path)
            counts += np.bincount(chunk[:_CHUNK_TOKENS], minlength=size)
            as_context += np.bincount(chunk[:-1], minlength=size)
            keys, times = np.unique(chunk[:-1] * size + chunk[1:], return_counts=True)
            place = np.minimum(np.searchsorted(pairs, keys), pairs.size - 1)
            known = pairs[place] == keys
            pair_counts[place[known]] += times[known]
    return counts, as_context, pair_counts


def _ids(tokens: np.ndarray, size: int, path: str | os.PathLike[str]) -> np.ndarray:
    """The tokens as int64, all below the size of the vocabulary."""
    largest = int(tokens.max())
    if largest >= size:
        raise ShardError(
            f"{path}: token {largest} is outside the tokenizer's vocabulary of {size}; "
            "prepare the shards again with this tokenizer."
        )
    return tokens.astype(np.int64)
