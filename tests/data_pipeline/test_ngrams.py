import math

import numpy as np
import pytest

from data_pipeline import ngrams, write_shard
from data_pipeline.ngrams import baselines
from data_pipeline.shards import ShardError
from data_pipeline.tokenizer import gpt2

SIZE = 300


def by_definition(train, val, count):
    """Both losses with Python loops over the formulas."""
    tokens = [int(t) for shard in train for t in shard]
    pairs = [(int(a), int(b)) for s in train for a, b in zip(s[:-1], s[1:], strict=True)]
    unigram = bigram = 0.0
    for u, v in zip(val[:count], val[1 : count + 1], strict=True):
        p1 = (tokens.count(v) + 1) / (len(tokens) + SIZE)
        context = sum(a == u for a, _ in pairs)
        p2 = 0.7 * pairs.count((u, v)) / context + 0.3 * p1 if context else p1
        unigram, bigram = unigram - math.log(p1), bigram - math.log(p2)
    return unigram / count, bigram / count


@pytest.fixture
def texts(tmp_path):
    """Three training shards, and validation with ids and contexts that training has not."""
    rng = np.random.default_rng(0)
    train = [rng.integers(0, 20, n).astype(np.uint16) for n in (83, 40, 1)]
    val = rng.integers(0, 25, 60).astype(np.uint16)
    train[1][-1] = 24  # 24 ends a shard: it has been seen, but never as a context
    paths = [tmp_path / f"x_train_{i}.bin" for i in range(3)]
    for path, tokens in zip([*paths, tmp_path / "x_val_0.bin"], [*train, val], strict=True):
        write_shard(path, tokens)
    return train, val, paths, tmp_path / "x_val_0.bin"


@pytest.mark.parametrize("chunk", [7, 10**6])
@pytest.mark.parametrize("count", [1, 32, 59])
def test_equals_the_definition(texts, monkeypatch, chunk, count):
    monkeypatch.setattr(ngrams, "_CHUNK_TOKENS", chunk)
    train, val, train_paths, val_path = texts
    result = baselines(train_paths, val_path, gpt2(SIZE), count)
    unigram, bigram = by_definition(train, val.tolist(), count)
    assert result.val_tokens == count
    assert result.unigram == pytest.approx(unigram, rel=1e-12)
    assert result.bigram == pytest.approx(bigram, rel=1e-12)


def test_probabilities_sum_to_one(tmp_path):
    """A context followed by every id once: the mean of exp(-loss) over them is 1 / size."""
    train = np.array([5, 6, 5, 7, 9, 9], np.uint16)
    write_shard(tmp_path / "x_train_1.bin", train)
    total = 0.0
    for target in range(SIZE):
        write_shard(tmp_path / "x_val_0.bin", np.array([5, target], np.uint16))
        result = baselines([tmp_path / "x_train_1.bin"], tmp_path / "x_val_0.bin", gpt2(SIZE), 1)
        total += math.exp(-result.bigram)
    assert total == pytest.approx(1.0, rel=1e-12)


def test_bytes_and_bits(tmp_path):
    encoder = gpt2(SIZE)
    text = "The government of the United States"
    tokens = np.concatenate([np.array([encoder.end_of_text], np.uint16), encoder.encode(text)])
    for split in ("train", "val"):
        write_shard(tmp_path / f"x_{split}_0.bin", tokens)
    paths = [tmp_path / "x_train_0.bin"]
    result = baselines(paths, tmp_path / "x_val_0.bin", encoder, tokens.size - 1)
    assert result.bytes_per_token * (tokens.size - 1) == pytest.approx(len(text))
    bits = result.unigram * (tokens.size - 1) / math.log(2)
    assert result.bits_per_byte(result.unigram) == pytest.approx(bits / len(text))


@pytest.mark.parametrize("count", [0, 60])
def test_refuses_more_tokens_than_there_are(texts, count):
    _, _, train_paths, val_path = texts
    with pytest.raises(ShardError, match=f"val_tokens={count} does not fit in its 60 tokens"):
        baselines(train_paths, val_path, gpt2(SIZE), count)


def test_refuses_ids_of_another_tokenizer(texts, tmp_path):
    _, _, _, val_path = texts
    write_shard(tmp_path / "other.bin", np.array([1, 300, 2], np.uint16))
    with pytest.raises(ShardError, match="other.bin: token 300 .* vocabulary of 300"):
        baselines([tmp_path / "other.bin"], val_path, gpt2(SIZE), 10)
