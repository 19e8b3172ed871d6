import json
import os

import numpy as np
import pytest

from data_pipeline import checks, write_shard
from data_pipeline.checks import FILE_NAME, check_shards, scan
from data_pipeline.shards import ShardError


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.bin"
    write_shard(path, np.arange(10, dtype=np.uint16))
    return path


def test_scans_every_token(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "_SCAN_TOKENS", 4)
    good, bad = tmp_path / "good.bin", tmp_path / "bad.bin"
    write_shard(good, np.full(10, 99, np.uint16))
    write_shard(bad, np.array([1, 2, 3, 4, 5, 6, 100, 99, 9], np.uint16))
    assert check_shards([good], vocab_size=100) == 10
    with pytest.raises(ShardError, match="token 100 at position 6 .* vocabulary of 100") as error:
        check_shards([good, bad], vocab_size=100)
    assert str(bad) in str(error.value)


def test_a_shard_is_read_once_until_it_changes(good, monkeypatch):
    read = []
    holes = checks._holes
    monkeypatch.setattr(checks, "_holes", lambda chunk: read.append(1) or holes(chunk))
    assert scan(good) == scan(good)
    assert check_shards([good], vocab_size=10) == 10
    with pytest.raises(ShardError, match="token 9"):  # remembered for every vocabulary
        check_shards([good], vocab_size=9)
    assert len(read) == 1
    write_shard(good, np.full(10, 7, np.uint16))  # the same size
    os.utime(good, ns=(0, 1))
    assert scan(good).highest == 7
    assert len(read) == 2


@pytest.mark.parametrize("content", ["", "[1]", '{"good.bin": 3}', '{"good.bin": {"size": 1}}'])
def test_a_spoilt_memory_is_none(good, content):
    (good.parent / FILE_NAME).write_text(content)
    assert scan(good).highest == 9
    assert json.loads((good.parent / FILE_NAME).read_text())["good.bin"]["highest"] == 9


def test_a_folder_that_cannot_be_written_is_checked_all_the_same(good, monkeypatch):
    def refuse(self, target):
        raise PermissionError

    monkeypatch.setattr(type(good), "replace", refuse)
    assert scan(good).highest == 9
    assert [path.name for path in good.parent.iterdir()] == ["good.bin"]


@pytest.mark.parametrize(("begin", "found"), [(3000, 4096), (4096, 4096), (4097, -1)])
def test_finds_what_a_disk_left_empty(tmp_path, begin, found):
    tokens = np.random.default_rng(0).integers(0, 50257, 9000).astype(np.uint16)
    tokens[2047] = tokens[0]  # equal ends are no hole
    tokens[begin:6144] = 0
    write_shard(tmp_path / "x.bin", tokens)
    assert scan(tmp_path / "x.bin").hole_at == found


def test_a_pipe_in_the_place_of_the_memory_is_not_waited_for(good):
    os.mkfifo(good.parent / FILE_NAME)
    assert scan(good).highest == 9
    assert json.loads((good.parent / FILE_NAME).read_text())["good.bin"]["highest"] == 9
