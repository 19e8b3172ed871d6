import hashlib
import json

import numpy as np
import pytest

from data_pipeline import open_tokens, prepare, read_manifest, shard_paths
from data_pipeline.corpora import Corpus, Document
from data_pipeline.ngrams import baselines
from data_pipeline.shards import ShardError
from data_pipeline.tokenizer import gpt2


def corpus(documents=40, version="1", val_every=10, fail_at=None):
    def generate():
        for i in range(documents):
            if i == fail_at:
                raise OSError("disk on fire")
            split = "val" if i % val_every == 0 else "train"
            yield Document(f"d{i}", f"Document {i} of the people. " * (i + 1), split)

    return Corpus("tiny", version, "none", "every tenth", generate)


def expected_tokens(split, encoder, **kwargs):
    parts = []
    for document in corpus(**kwargs).documents():
        if document.split == split:
            parts += [[encoder.end_of_text], encoder.encode(document.text)]
    return np.concatenate(parts)


@pytest.mark.parametrize("shard_tokens", [10**8, 1000, 2500])
def test_shards_hold_the_documents_in_order(tmp_path, shard_tokens):
    encoder = gpt2(300)
    manifest = prepare(corpus(), tmp_path, encoder, shard_tokens=shard_tokens)
    for split, first, listed in (("train", 1, manifest.train), ("val", 0, manifest.val)):
        paths = shard_paths(tmp_path, split)
        assert [p.name for p in paths] == [s.file for s in listed]
        assert paths[0].name == f"tiny_{split}_{first:06d}.bin"
        tokens = [open_tokens(path)[:] for path in paths]
        np.testing.assert_array_equal(np.concatenate(tokens), expected_tokens(split, encoder))
        sizes = [t.size for t in tokens]
        assert max(sizes) <= shard_tokens
        assert len(sizes) == 1 or min(sizes) >= shard_tokens // 2
        assert [s.tokens for s in listed] == sizes
    assert manifest.train_tokens == sum(s.tokens for s in manifest.train)


def test_manifest_tells_everything(tmp_path):
    encoder = gpt2(300)
    manifest = prepare(corpus(), tmp_path, encoder, val_tokens=64, shard_tokens=1000)
    assert read_manifest(tmp_path) == manifest
    fields = json.loads((tmp_path / "manifest.json").read_text())
    assert fields["source"] == {
        "corpus": "tiny",
        "version": "1",
        "licence": "none",
        "split_rule": "every tenth",
        "tokenizer": "gpt2",
        "vocab_size": 300,
        "merges_sha256": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "shard_tokens": 1000,
    }
    for shard in fields["train"] + fields["val"]:
        content = (tmp_path / shard["file"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest.documents == 40
    assert sum(shard.documents for shard in manifest.val) == 4
    train, val = shard_paths(tmp_path, "train"), shard_paths(tmp_path, "val")
    assert manifest.baselines == baselines(train, val[0], encoder, 64)


def test_baselines_cover_the_whole_validation_shard_by_default(tmp_path):
    manifest = prepare(corpus(), tmp_path, gpt2(300))
    assert manifest.baselines.val_tokens == manifest.val[0].tokens - 1


def must_not_read():
    raise AssertionError("the corpus was read again")


def test_does_nothing_twice(tmp_path):
    first = prepare(corpus(), tmp_path, gpt2(300))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = Corpus("tiny", "1", "none", "every tenth", must_not_read)
    assert prepare(again, tmp_path, gpt2(300)) == first
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    scored = prepare(again, tmp_path, gpt2(300), val_tokens=32)
    assert scored.baselines.val_tokens == read_manifest(tmp_path).baselines.val_tokens == 32


@pytest.mark.parametrize("change", ["version", "vocabulary", "damage", "loss"])
def test_prepares_again_what_changed(tmp_path, change):
    prepare(corpus(), tmp_path, gpt2(300), shard_tokens=1000)
    shard = tmp_path / "tiny_train_000001.bin"
    if change == "damage":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    if change == "loss":
        shard.unlink()
    kwargs = {"documents": 20, "version": "2"} if change == "version" else {}
    encoder = gpt2(400 if change == "vocabulary" else 300)
    manifest = prepare(corpus(**kwargs), tmp_path, encoder, shard_tokens=1000)
    tokens = np.concatenate([open_tokens(path)[:] for path in shard_paths(tmp_path, "train")])
    np.testing.assert_array_equal(tokens, expected_tokens("train", encoder, **kwargs))
    listed = {s.file for s in manifest.train + manifest.val} | {"manifest.json"}
    assert {path.name for path in tmp_path.iterdir()} == listed


def test_a_failure_leaves_the_earlier_preparation(tmp_path):
    first = prepare(corpus(), tmp_path, gpt2(300))
    with pytest.raises(OSError, match="on fire"):
        prepare(corpus(version="2", fail_at=20), tmp_path, gpt2(300))
    with pytest.raises(ShardError, match="val_tokens=999999 does not fit"):
        prepare(corpus(version="2"), tmp_path, gpt2(300), val_tokens=999999)
    assert read_manifest(tmp_path) == first
    assert first.is_intact(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_refuses_shards_of_unknown_origin(tmp_path):
    (tmp_path / "fineweb_train_000001.bin").touch()
    with pytest.raises(ShardError, match="holds fineweb_train_000001.bin .* another folder"):
        prepare(corpus(), tmp_path, gpt2(300))


@pytest.mark.parametrize(("split", "missing"), [("val", "train"), ("train", "val")])
def test_refuses_an_empty_split(tmp_path, split, missing):
    documents = [Document("a", "some text", split)]
    one_sided = Corpus("tiny", "1", "none", "none", lambda: iter(documents))
    with pytest.raises(ShardError, match=rf"no \*_{missing}_\*\.bin shard"):
        prepare(one_sided, tmp_path, gpt2(300))


@pytest.mark.parametrize("content", ["{", "{}", '{"source": {"x": 1}}'])
def test_refuses_a_foreign_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ShardError, match="manifest.json: not a manifest .* delete it"):
        read_manifest(tmp_path)


def test_names_a_missing_manifest(tmp_path):
    with pytest.raises(ShardError, match="no such file; prepare the folder"):
        read_manifest(tmp_path)
