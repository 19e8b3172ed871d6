import os
import pickle
import struct

import numpy as np
import pytest

from data_pipeline import shards
from data_pipeline.shards import ShardError


def write_raw(path, *, magic=20240520, version=1, count=10, tokens=10, extra=b""):
    """A shard from the format's description, without the code under test."""
    header = struct.pack("<3i", magic, version, count).ljust(1024, b"\0")
    path.write_bytes(header + struct.pack(f"<{tokens}H", *range(tokens)) + extra)
    return path


def test_reads_a_file_made_from_the_description(tmp_path):
    path = write_raw(tmp_path / "a.bin")
    tokens = shards.open_tokens(path)[:]
    assert shards.read_header(path) == 10
    assert tokens.dtype == np.uint16
    np.testing.assert_array_equal(tokens, range(10))


def test_writes_a_file_as_in_the_description(tmp_path):
    expected = write_raw(tmp_path / "a.bin").read_bytes()
    shards.write_shard(tmp_path / "b.bin", np.arange(10, dtype=np.uint16))
    assert (tmp_path / "b.bin").read_bytes() == expected


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"magic": 20240521}, "magic number 20240521, expected 20240520"),
        ({"version": 2}, "format version 2"),
        ({"count": 11}, "announces 11 tokens"),
        ({"count": 9}, "announces 9 tokens"),
        ({"extra": b"\0"}, "1045 bytes"),
        ({"count": 0, "tokens": 0}, "announces 0 tokens"),
    ],
)
def test_refuses_a_damaged_shard_with_name_and_remedy(tmp_path, fault, message):
    path = write_raw(tmp_path / "bad.bin", **fault)
    with pytest.raises(ShardError, match=message) as error:
        shards.open_tokens(path)
    assert str(path) in str(error.value)
    assert "nanogpt data" in str(error.value)


def test_refuses_a_missing_file_and_half_a_header(tmp_path):
    with pytest.raises(ShardError, match="no such file"):
        shards.read_header(tmp_path / "none.bin")
    short = tmp_path / "short.bin"
    short.write_bytes(write_raw(tmp_path / "a.bin").read_bytes()[:1000])
    with pytest.raises(ShardError, match="1000 bytes, shorter than the 1024"):
        shards.read_header(short)


@pytest.mark.parametrize(
    "tokens", [np.arange(3), np.zeros((2, 2), np.uint16), np.array([], np.uint16)]
)
def test_writes_nothing_but_uint16_vectors(tmp_path, tokens):
    with pytest.raises(ShardError, match="non-empty uint16 vector"):
        shards.write_shard(tmp_path / "a.bin", tokens)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_raw(tmp_path / "a.bin")
    before = path.read_bytes()

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shards.write_shard(path, np.zeros(5, np.uint16))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_lists_a_split_in_order(tmp_path):
    for name in ("x_train_000002.bin", "x_val_000000.bin", "x_train_000001.bin", "x_train_1.txt"):
        (tmp_path / name).touch()
    names = [path.name for path in shards.shard_paths(tmp_path, "train")]
    assert names == ["x_train_000001.bin", "x_train_000002.bin"]
    with pytest.raises(ShardError, match=r"no \*_test_\*\.bin shard; prepare one"):
        shards.shard_paths(tmp_path, "test")


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, 1030),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), write_raw(path), os.utime(path, (0, 0))),
    ],
)
def test_a_shard_that_changes_is_refused_when_it_is_read(tmp_path, change, read_before):
    path = write_raw(tmp_path / "a.bin")
    tokens = shards.open_tokens(path)
    if read_before:
        np.testing.assert_array_equal(tokens[2:5], [2, 3, 4])
    change(path)
    with pytest.raises(ShardError, match=r"a\.bin: was changed while it was read; put .* --resume"):
        tokens[8:]


def test_a_shard_that_becomes_shorter_behind_the_last_look_is_refused(tmp_path, monkeypatch):
    """A memory map would end the process."""
    path = write_raw(tmp_path / "a.bin", count=100_000, tokens=0, extra=bytes(200_000))
    tokens = shards.open_tokens(path)
    monkeypatch.setattr(shards, "_size_and_time", lambda path: tokens._known)
    assert not tokens[90_000:].any()
    os.truncate(path, 1024)
    with pytest.raises(ShardError, match="was changed while it was read"):
        tokens[90_000:]


def test_parts_are_those_of_an_array(tmp_path):
    tokens = shards.open_tokens(write_raw(tmp_path / "a.bin"))
    for part in (slice(None), slice(-3, None), slice(4, 2), slice(8, 99), slice(0, 0)):
        np.testing.assert_array_equal(tokens[part], np.arange(10)[part])
    again = pickle.loads(pickle.dumps(tokens))
    np.testing.assert_array_equal(again[:], range(10))
