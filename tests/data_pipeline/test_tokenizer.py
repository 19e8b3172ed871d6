import lzma
from importlib import resources

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data_pipeline import tokenizer
from data_pipeline.tokenizer import gpt2

# Encodings by the published GPT-2 tokenizer.
KNOWN = {
    "Hello world": [15496, 995],
    "The quick brown fox jumps over the lazy dog.": [
        *(464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13),
    ],
}


@pytest.mark.parametrize("text", KNOWN)
def test_encodes_as_gpt2(text):
    tokens = gpt2().encode(text)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == KNOWN[text]


def test_end_of_text_is_the_last_id_and_never_comes_from_text():
    for size in (257, 1024, 50257):
        encoder = gpt2(size)
        assert encoder.vocab_size == size
        assert encoder.end_of_text == size - 1
        assert encoder.end_of_text not in encoder.encode("a<|endoftext|>b")
        assert encoder.decode(np.array([size - 1])) == "<|endoftext|>"


def merge_by_hand(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding by its definition: join the pair of lowest rank until none is left."""
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        if not pairs or min(pairs) == len(ranks):
            return [ranks[part] for part in parts]
        i = int(np.argmin(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("size", [257, 300, 1024, 4096])
def test_a_truncated_vocabulary_is_the_bpe_of_its_first_merges(size):
    whole = gpt2()
    ranks = {}
    for token in range(size - 1):
        ranks[b"".join(whole._encoding.decode_tokens_bytes([token]))] = token
    words = ["the", " government", " Constitution", "naïve", " 1794", "!!", "constitutional"]
    for word in words:
        assert gpt2(size).encode(word).tolist() == merge_by_hand(word.encode(), ranks), word


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(text=st.text(max_size=60), size=st.sampled_from([257, 1024, 50257]))
def test_every_text_survives(text, size):
    encoder = gpt2(size)
    tokens = encoder.encode(text)
    assert encoder.decode(tokens) == text
    assert encoder.token_bytes()[tokens].sum() == len(text.encode())


def test_special_token_stands_for_no_bytes():
    lengths = gpt2(300).token_bytes()
    assert lengths.shape == (300,)
    assert lengths[-1] == 0
    assert (lengths[:256] == 1).all()
    assert (lengths[256:-1] > 1).all()


def test_fingerprints_tell_vocabularies_apart():
    assert gpt2(300).fingerprint != gpt2(301).fingerprint
    assert gpt2(300).fingerprint == gpt2(300).fingerprint
    assert len(gpt2(300).fingerprint) == 64


@pytest.mark.parametrize("size", [0, 256, 50258])
def test_refuses_impossible_sizes(size):
    with pytest.raises(ValueError, match=f"vocab_size={size}: choose one from 257"):
        gpt2(size)


@pytest.mark.parametrize("damage", ["cut", "bit", "other table", "empty"])
def test_refuses_a_damaged_merge_table(tmp_path, monkeypatch, damage):
    packed = resources.files("data_pipeline").joinpath("gpt2_merges.xz").read_bytes()
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 1
    damaged = {
        "cut": packed[:-100],
        "bit": bytes(flipped),
        "other table": lzma.compress(b"#version: 0.2\nh e\n"),
        "empty": b"",
    }[damage]
    (tmp_path / "gpt2_merges.xz").write_bytes(damaged)
    tokenizer._gpt2_tokens.cache_clear()
    monkeypatch.setattr(tokenizer.resources, "files", lambda _: tmp_path)
    with pytest.raises(ValueError, match="gpt2_merges.xz: sha256 .* damaged"):
        tokenizer._gpt2_tokens()
