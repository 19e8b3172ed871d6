import itertools
import pickle
from typing import Any

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from data_pipeline import loader, write_shard
from data_pipeline.loader import fingerprint, needed_shards, train_batches, val_batches
from data_pipeline.shards import ShardError
from scripts.maintenance.parity import inputs as parity
from scripts.maintenance.parity.measurement import misses

SETTINGS: dict[str, Any] = {"sequence_length": 8, "batch_rows": 4}


def take(paths, count=None, **settings):
    """The first batches as (inputs, targets) arrays (batches, rows, T)."""
    iterator = train_batches(paths, **(SETTINGS | settings))
    try:
        batches = list(itertools.islice(iterator, count))
    finally:
        iterator.close()
    return tuple(np.array([batch[key] for batch in batches]) for key in ("inputs", "targets"))


def make_shards(directory, sizes):
    """Shards whose tokens number on from shard to shard."""
    paths, start = [], 0
    for i, size in enumerate(sizes):
        paths.append(directory / f"x_train_{i:06d}.bin")
        write_shard(paths[-1], np.arange(start, start + size).astype(np.uint16))
        start += size
    return paths


@pytest.fixture
def paths(tmp_path):
    return make_shards(tmp_path, [100, 75, 136])


@pytest.mark.trap("A15", "A16")
@pytest.mark.parametrize(("world", "rank"), [(1, 0), (4, 0), (4, 1), (4, 2), (4, 3)])
def test_sequential_equals_the_benchmark(world, rank):
    assert not misses(parity.loader(rank, world))


@pytest.mark.trap("A16")
@pytest.mark.parametrize(
    ("sizes", "starts"),
    [
        ([65, 66], [0, 65, 97]),  # 65: a second batch would fit exactly, and is not taken
        ([66, 65], [0, 32, 66]),
        ([33, 34], [33]),  # exactly one batch: nothing from the first shard,
        ([34, 33, 34], [0, 34, 67]),  # but one batch from any other
    ],
)
def test_sequential_border_cases(tmp_path, sizes, starts):
    inputs, _ = take(make_shards(tmp_path, sizes), mode="sequential")
    np.testing.assert_array_equal(inputs[:, 0, 0], starts)


@pytest.mark.trap("A16")
def test_batch_191_of_the_benchmark_is_in_its_second_shard(tmp_path):
    """The benchmark's shard and batch, both divided by 1000."""
    paths = make_shards(tmp_path, [100_000, 2_000])
    write_shard(paths[1], np.full(2_000, 7, np.uint16))
    inputs, _ = take(paths, sequence_length=131, batch_rows=4, mode="sequential")
    assert inputs.dtype == np.int32
    assert [bool((batch == 7).all()) for batch in inputs] == [False] * 190 + [True] * 3


def rows_of(paths):
    """All rows (T + 1 tokens) of the shards in order."""
    rows = []
    for path in paths:
        tokens = np.fromfile(path, "<u2", offset=1024)
        rows += [tokens[k : k + 9] for k in range(0, tokens.size - 8, 8)]
    return np.array(rows)


def test_an_epoch_is_every_row_once(paths):
    rows = rows_of(paths)
    epoch = len(rows) // 4
    assert len(rows) % 4 == 1  # so that epochs run into each other inside a batch
    inputs, targets = take(paths, 3 * epoch, mode="shuffled")
    np.testing.assert_array_equal(inputs[:, :, 1:], targets[:, :, :-1])
    drawn = np.concatenate([inputs, targets[:, :, -1:]], axis=2).reshape(-1, 9)
    first, second = drawn[: len(rows)], drawn[len(rows) : 2 * len(rows)]
    for drawn_rows in (first, second):
        np.testing.assert_array_equal(drawn_rows[np.argsort(drawn_rows[:, 0])], rows)
    assert (first != rows).any()
    assert (first != second).any()


def test_the_seed_decides_the_order(paths):
    one, same, other = (take(paths, 20, mode="shuffled", seed=seed)[0] for seed in (1, 1, 5))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.parametrize("mode", ["sequential", "shuffled"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_read_the_global_batch(paths, mode, world):
    whole = take(paths, 8, mode=mode)
    parts = [take(paths, 8, mode=mode, rank=rank, world=world) for rank in range(world)]
    for whole_array, part_arrays in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(part_arrays, axis=1), whole_array)


@pytest.mark.parametrize(("mode", "stop", "total"), [("sequential", 3, 9), ("shuffled", 7, 30)])
def test_orbax_restores_the_position(tmp_path, paths, mode, stop, total):
    """Saved in the middle of an epoch while reading goes on; the rest crosses epochs or shards."""
    expected, _ = take(paths, total, mode=mode, seed=3)
    assert len(expected) == total
    iterator = train_batches(paths, **SETTINGS, mode=mode, seed=3)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        for _ in range(stop):
            next(iterator)
        manager.save(
            stop,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave({"step": np.int64(stop)}),
                data=grain.checkpoint.CheckpointSave(iterator),
            ),
        )
        for _ in range(4):  # the save goes on meanwhile
            next(iterator)
        manager.wait_until_finished()
        iterator.close()
        fresh = train_batches(paths, **SETTINGS, mode=mode, seed=3)
        manager.restore(
            stop, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh))
        )
    rest = [batch["inputs"] for batch in itertools.islice(fresh, total - stop)]
    fresh.close()
    np.testing.assert_array_equal(rest, expected[stop:])


@pytest.mark.parametrize("mode", ["sequential", "shuffled"])
def test_a_step_number_restores_the_position_on_any_number_of_ranks(paths, mode):
    expected, _ = take(paths, 9, mode=mode)
    parts = []
    for rank in range(2):
        iterator = train_batches(paths, **SETTINGS, mode=mode, rank=rank, world=2)
        grain.experimental.set_next_index(iterator, 5)
        parts.append([batch["inputs"] for batch in itertools.islice(iterator, 4)])
        iterator.close()
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected[5:])


def test_pickles_without_the_tokens(tmp_path):
    paths = make_shards(tmp_path, [50_000])
    spans = loader._Spans(paths, np.array([100]), stride=8, offset=0, length=9)
    opened = spans[3]
    content = pickle.dumps(spans)
    assert len(content) < 2_000
    np.testing.assert_array_equal(pickle.loads(content)[3], opened)


@pytest.mark.parametrize("mode", ["sequential", "shuffled"])
def test_refuses_a_shard_smaller_than_a_batch(tmp_path, mode):
    paths = make_shards(tmp_path, [100, 32, 100])
    message = "x_train_000001.bin: 32 tokens, less than the 33 .* lower batch_rows"
    with pytest.raises(ShardError, match=message):
        train_batches(paths, **SETTINGS, mode=mode)
    with pytest.raises(ShardError, match=message):
        needed_shards(paths, **SETTINGS, steps=1, mode=mode)


def test_chooses_the_shards_of_the_first_steps(tmp_path):
    paths = make_shards(tmp_path, [100, 100, 100])  # 3 batches of 32 each
    counts = [len(needed_shards(paths, **SETTINGS, steps=n, mode="sequential")) for n in (1, 3, 4)]
    assert counts == [1, 1, 2]


def test_refuses_more_steps_than_one_pass_has(paths):
    batches = len(take(paths, mode="sequential")[0])
    assert needed_shards(paths, **SETTINGS, steps=batches, mode="sequential") == paths
    assert needed_shards(paths, **SETTINGS, steps=10**6, mode="shuffled") == paths
    message = rf"hold {batches} batches .* takes {batches + 1} steps; add 1 shard.*--shards 4"
    with pytest.raises(ShardError, match=message):
        needed_shards(paths, **SETTINGS, steps=batches + 1, mode="sequential")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "random"}, "mode='random': choose"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"batch_rows": 0}, "rows of a batch=0"),
        ({"rank": 2, "world": 2}, r"rank=2: must be in 0\.\.1"),
        ({"rank": -1, "world": 2}, r"rank=-1: must be in 0\.\.1"),
        ({"world": 3}, "world=3 does not divide the 4 rows"),
    ],
)
def test_refuses_impossible_settings(paths, settings, message):
    with pytest.raises(ValueError, match=message):
        train_batches(paths, **(SETTINGS | {"mode": "shuffled"} | settings))


def test_refuses_no_shards():
    with pytest.raises(ShardError, match="paths is empty"):
        train_batches([], **SETTINGS, mode="shuffled")


def test_validation_is_the_start_of_the_shard(paths):
    batches = list(val_batches(paths[0], sequence_length=8, val_tokens=96, rows=4))
    inputs = np.array([batch["inputs"] for batch in batches])
    targets = np.array([batch["targets"] for batch in batches])
    assert inputs.shape == (3, 4, 8)
    assert inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(inputs.ravel(), range(96))
    np.testing.assert_array_equal(targets.ravel(), range(1, 97))


def test_validation_of_ranks_together_is_the_whole(paths):
    settings = {"sequence_length": 8, "val_tokens": 96, "rows": 4}
    whole = [batch["targets"] for batch in val_batches(paths[0], **settings)]
    parts = [
        [batch["targets"] for batch in val_batches(paths[0], **settings, rank=rank, world=2)]
        for rank in range(2)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_validation_refuses_at_once(paths):
    with pytest.raises(ValueError, match="val_tokens=90 is not .* the nearest is 96"):
        val_batches(paths[0], sequence_length=8, val_tokens=90, rows=4)
    with pytest.raises(
        ShardError, match="100 tokens, but val_tokens=128 needs 129; lower it to 96"
    ):
        val_batches(paths[0], sequence_length=8, val_tokens=128, rows=4)


def test_validation_may_use_every_token(tmp_path):
    enough, short = make_shards(tmp_path, [97, 96])
    assert len(list(val_batches(enough, sequence_length=8, val_tokens=96, rows=4))) == 3
    with pytest.raises(ShardError, match="96 tokens, but val_tokens=96 needs 97; lower it to 64"):
        val_batches(short, sequence_length=8, val_tokens=96, rows=4)
    with pytest.raises(ShardError, match="--data.val-tokens 64, .* --val-tokens 64"):
        val_batches(short, sequence_length=8, val_tokens=96, rows=4)
    (tiny,) = make_shards(tmp_path, [32])
    with pytest.raises(ShardError, match="one batch of 4 x 8 needs 33: hold out more text"):
        val_batches(tiny, sequence_length=8, val_tokens=96, rows=4)


def test_fingerprint_knows_files_settings_and_content(tmp_path, paths):
    original = fingerprint(paths, sequence_length=8, mode="shuffled", seed=0)
    assert original == fingerprint(paths, seed=0, mode="shuffled", sequence_length=8)
    assert original != fingerprint(paths, sequence_length=8, mode="shuffled", seed=1)
    assert original != fingerprint(paths[::-1], sequence_length=8, mode="shuffled", seed=0)
    renamed = paths[2].rename(tmp_path / "x_train_000009.bin")
    assert original != fingerprint(
        [*paths[:2], renamed], sequence_length=8, mode="shuffled", seed=0
    )
    write_shard(paths[2], np.zeros(136, np.uint16))
    assert original != fingerprint(paths, sequence_length=8, mode="shuffled", seed=0)
