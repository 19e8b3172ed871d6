"""The data of a run are checked when it opens them."""

import dataclasses

import jax
import numpy as np
import pytest

from data_pipeline import Baselines, Manifest, ShardError, Source, write_shard
from nanogpt.config.presets import preset
from nanogpt.config.run import Config
from nanogpt.train.batches import batch_pattern, open_data, to_device


@pytest.fixture
def config(tmp_path) -> Config:
    random = np.random.default_rng(0)
    for name, count in (("train_000001", 200), ("val_000000", 70)):
        write_shard(tmp_path / f"t_{name}.bin", random.integers(0, 50, count).astype(np.uint16))
    base = preset("cpu", "adamw")
    model = dataclasses.replace(base.model, vocab_size=50, sequence_length=8)
    data = dataclasses.replace(
        base.data, directory=str(tmp_path), batch_rows=4, microbatch_rows=2, val_tokens=64
    )
    return dataclasses.replace(base, model=model, data=data)


def change(config: Config, group: str, **values) -> Config:
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **values)}
    )


def test_batches_have_the_pattern_the_steps_are_compiled_for(config):
    data = open_data(config)
    for rows, batch in ((4, next(data.training)), (2, next(data.validation()))):
        placed = to_device(batch)
        pattern = batch_pattern(rows, config)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), placed) == jax.tree.map(
            lambda x: (x.shape, x.dtype), pattern
        )
        np.testing.assert_array_equal(placed["inputs"], batch["inputs"])
    data.training.close()


def test_validation_begins_anew_at_each_call(config):
    data = open_data(config)
    first, second = list(data.validation()), list(data.validation())
    assert len(first) == len(second) == 4
    np.testing.assert_array_equal(first[0]["inputs"], second[0]["inputs"])
    data.training.close()


@pytest.mark.parametrize("split", ["train_000001", "val_000000"])
def test_a_shard_that_changes_in_the_run_is_refused(config, tmp_path, split):
    """What was checked is not what is read."""
    data = open_data(config)
    next(data.training), next(data.validation())
    shard = tmp_path / f"t_{split}.bin"
    shard.write_bytes(shard.read_bytes()[:1024])
    with pytest.raises(ShardError, match=f"{split}.bin: was changed while it was read"):
        for _ in range(100):
            next(data.training), next(data.validation())
    data.training.close()


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("data", {"val_tokens": 128}, "val_tokens=128"),
        ("data", {"val_tokens": 60}, "val_tokens=60"),
        ("data", {"directory": "nowhere"}, "nowhere"),
        ("data", {"mode": "sequential"}, "the run takes"),
        ("model", {"vocab_size": 40}, "t_train_000001"),
    ],
)
def test_impossible_runs_are_refused(config, group, values, message):
    with pytest.raises((ShardError, ValueError), match=message):
        open_data(change(config, group, **values))


def test_fingerprint_follows_whatever_decides_the_batches(config):
    def fingerprint(changed: Config) -> str:
        data = open_data(changed)
        data.training.close()
        return data.fingerprint

    same, other = fingerprint(config), fingerprint(change(config, "data", seed=1))
    assert fingerprint(config) == same != other
    assert fingerprint(change(config, "model", sequence_length=16)) not in (same, other)


@pytest.mark.parametrize(("scored", "known"), [(64, True), (48, False)])
def test_baselines_count_only_on_the_tokens_that_are_scored(config, scored, known):
    source = Source("t", "1", "none", "none", "bytes", 50)
    figures = Baselines(scored, bytes_per_token=3.0, unigram=3.5, bigram=3.0)
    Manifest(source, (), (), figures).write(config.data.directory)
    data = open_data(config)
    assert data.baselines == (figures if known else None)
    assert [note for note in data.notes if "again with --val-tokens 64" in note] == list(data.notes)
    assert len(data.notes) == (not known)
    data.training.close()


@pytest.mark.parametrize("model", [40, 64, 50 + 128])
def test_shards_of_another_vocabulary_are_named(config, model):
    source = Source("t", "1", "none", "none", "bytes", 50)
    Manifest(source, (), (), Baselines(64, 3.0, 3.5, 3.0)).write(config.data.directory)
    config = change(config, "model", vocab_size=model)
    if model < 50:
        with pytest.raises(ShardError, match="--model.vocab-size 50, .* --vocab-size 40"):
            open_data(config)
        return
    data = open_data(config)
    data.training.close()
    assert ["use only 50 of the 178 ids" in note for note in data.notes] == [True] * (model > 64)


@pytest.mark.parametrize("end", [48, 49])
def test_documents_begin_where_the_texts_of_the_shards_do(config, end):
    source = Source("t", "1", "none", "none", "bytes", 50)
    Manifest(source, (), (), Baselines(64, 3.0, 3.5, 3.0)).write(config.data.directory)
    sizes = {"vocab_size": 50, "sequence_length": 8, "mask_block": 4, "window": 8}
    model = dataclasses.replace(preset("medium_board", "adamw").model, **sizes, end_of_text=end)
    config = dataclasses.replace(config, model=model)
    if end == 48:
        with pytest.raises(ShardError, match="set --model.end-of-text 49"):
            open_data(config)
        return
    open_data(config).training.close()
