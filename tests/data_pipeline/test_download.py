import errno
import os
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipeline import download, write_shard
from data_pipeline.download import fineweb, missing, shard_bytes, shards_needed
from data_pipeline.shards import ShardError

TOKENS = 3000


class Hub:
    """Stands in for hf_hub_download, which keeps a file that is there, whatever its content.

    `broken` names are served damaged, all of them in the same way.
    """

    def __init__(self, broken=(), damage="cut"):
        self.fetched, self.broken, self.damage = [], broken, damage

    def __call__(self, *, repo_id, filename, repo_type, local_dir):
        assert (repo_id, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset")
        self.fetched.append(filename)
        path = f"{local_dir}/{filename}"
        if os.path.exists(path):
            return
        write_shard(path, np.arange(TOKENS, dtype=np.uint16))
        if filename in self.broken:
            with open(path, "r+b") as file:
                if self.damage == "cut":
                    file.truncate(500 + 1024)
                else:
                    file.seek(1024)
                    file.write(self.damage)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(download, "SHARD_TOKENS", TOKENS)


def test_fetches_validation_and_the_first_training_shards(tmp_path):
    hub = Hub()
    paths = fineweb(tmp_path, 2, fetch=hub)
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert hub.fetched == [path.name for path in paths] == names


def test_goes_on_where_it_stopped_and_replaces_damage(tmp_path):
    fineweb(tmp_path, 2, fetch=Hub())
    with (tmp_path / "fineweb_train_000001.bin").open("r+b") as file:
        file.truncate(1050)
    write_shard(
        tmp_path / "fineweb_train_000002.bin", np.arange(50, dtype=np.uint16)
    )  # not a full one
    hub = Hub()
    fineweb(tmp_path, 3, fetch=hub)
    assert hub.fetched == [f"fineweb_train_{n:06d}.bin" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("cut", "1524 bytes, but its header announces 3000 tokens"),
        (bytes([0xFF]) * 8, "token 65535 at position 0 is none of GPT-2's"),
        (bytes(2 * TOKENS), "one token again and again from position 0"),
    ],
)
def test_refuses_what_stays_damaged_and_fetches_it_again(tmp_path, damage, told):
    name = "fineweb_train_000001.bin"
    with pytest.raises(ShardError, match=f"{name}: damaged after its download: .*{told}"):
        fineweb(tmp_path, 1, fetch=Hub(broken=[name], damage=damage))
    assert missing(tmp_path, 2) == [name, "fineweb_train_000002.bin"]
    hub = Hub()
    fineweb(tmp_path, 1, fetch=hub)
    assert hub.fetched == [name]


def test_refuses_a_disk_that_is_too_small_before_the_first_download(tmp_path, monkeypatch):
    free = 3 * shard_bytes() - 1
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    hub = Hub()
    with pytest.raises(ShardError, match="3 shards to download need .* GB left; make room"):
        fineweb(tmp_path, 2, fetch=hub)
    assert hub.fetched == []
    fineweb(tmp_path, 1, fetch=hub)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "full"), "make room there"),
        (ConnectionError("no"), "huggingface.co"),
        (RuntimeError("timed out"), "RuntimeError: timed out.*huggingface.co"),  # as httpx raises
    ],
)
def test_a_failed_download_says_what_to_do(tmp_path, error, remedy):
    def fail(**settings):
        raise error

    with pytest.raises(ShardError, match=f"fineweb_val_000000.bin: .*{remedy}.*complete files are"):
        fineweb(tmp_path, 1, fetch=fail)


def test_the_last_shard_may_be_short(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TRAIN_SHARDS", 2)
    write_shard(tmp_path / "fineweb_train_000002.bin", np.arange(50, dtype=np.uint16))
    hub = Hub()
    fineweb(tmp_path, 2, fetch=hub)
    assert hub.fetched == ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]


@pytest.mark.parametrize("count", [0, 104])
def test_refuses_shards_that_do_not_exist(tmp_path, count):
    with pytest.raises(ShardError, match=f"train_shards={count}: .* has 1 to 103"):
        fineweb(tmp_path, count, fetch=Hub())


@pytest.mark.parametrize(
    ("steps", "shards"),
    [(1, 1), (190, 1), (191, 2), (3250, 18), (3375, 18), (4100, 22), (4950, 27)],
)
def test_shards_of_the_benchmark(steps, shards):
    assert shards_needed(steps, 524288, shard_tokens=10**8) == shards


def test_refuses_a_batch_larger_than_a_shard():
    assert shards_needed(3, 98, shard_tokens=100) == 3
    with pytest.raises(ShardError, match="batch_tokens=99: no batch fits"):
        shards_needed(3, 99, shard_tokens=100)
