import dataclasses
import inspect
import json

import numpy as np
import pytest

import data_pipeline
from data_pipeline import read_manifest
from nanogpt.config.presets import preset
from nanogpt.lab import data as prepare_data
from nanogpt.lab.command_line import read_config, split_arguments
from nanogpt.train.batches import open_data


def run(*arguments):
    prepare_data.main([*map(str, arguments)])


def test_folder_from_the_command_line(tmp_path, capsys):
    lines = [json.dumps({"text": f"Line {i} of the text."}) for i in range(50)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    run("folder", tmp_path / "in", "--directory", out, "--vocab-size", "300")
    printed = capsys.readouterr().out
    manifest = read_manifest(out)
    assert manifest.documents == 50
    assert manifest.source.vocab_size == 300
    assert printed.startswith(f"{out}\n")
    assert f"train {manifest.train_tokens:,} tokens" in printed
    assert f"bigram {manifest.baselines.bigram:.4f}" in printed


def test_bad_input_ends_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="^error: .*no such folder; pass a folder"):
        run("folder", tmp_path / "none", "--directory", tmp_path / "out")


def prepared(tmp_path, words: int, *arguments):
    """A folder of shards made of random words; the run that preset cpu has on it."""
    text = ["the", "people", "of", "these", "States", "government", "and", "union", "law", "is"]
    (tmp_path / "in").mkdir()
    drawn = np.random.default_rng(0).choice(text, words)
    (tmp_path / "in" / "ALL.TXT").write_text(" ".join(drawn))
    out = tmp_path / "out"
    run("folder", tmp_path / "in", "--directory", out, *arguments)
    options, rest = split_arguments(["--data.directory", str(out)])
    return read_manifest(out), read_config(options, "adamw", "x", rest)


def test_a_folder_of_a_few_megabytes_suits_the_demo_preset(tmp_path):
    """README's recipe: the shards of 3 MB are enough for the preset's validation."""
    manifest, config = prepared(tmp_path, 600_000)
    demo = preset("cpu", "adamw")
    assert manifest.baselines.val_tokens == demo.data.val_tokens < manifest.val[0].tokens
    assert manifest.val[0].tokens < 0.2 * manifest.train_tokens
    assert (config.model, config.data.val_tokens) == (demo.model, demo.data.val_tokens)


@pytest.mark.parametrize("vocabulary", [(), ("--vocab-size", "300")])
def test_a_megabyte_trains_as_it_is_prepared(tmp_path, vocabulary):
    """Vocabulary and validation tokens of the run are those of the folder."""
    manifest, config = prepared(tmp_path, 180_000, *vocabulary)
    assert config.model.vocab_size == manifest.source.vocab_size
    data = open_data(config)
    data.training.close()
    assert data.baselines is not None and data.notes == ()
    assert 2 * 8 * 256 < config.data.val_tokens <= preset("cpu", "adamw").data.val_tokens


def test_demo_text_gets_the_demo_vocabulary():
    flags = inspect.signature(prepare_data.sotu).parameters
    demo = preset("cpu", "adamw")
    assert {name: flag.default for name, flag in flags.items()} == {
        "directory": demo.data.directory,
        "vocab_size": demo.model.vocab_size,
        "val_tokens": demo.data.val_tokens,
    }


@pytest.mark.parametrize("corpus", [["sotu"], ["folder", "texts"], ["fineweb"]])
def test_a_folder_of_no_machine_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="directory='gs://bucket/x': must be a folder of this"):
        run(*corpus, "--directory", "gs://bucket/x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["source"].pop("vocab_size"),
        lambda m: m["source"].update(vocab_size="300"),
        lambda m: m["baselines"].update(val_tokens=None),
        lambda m: m.update(source=[1]),
        lambda m: m.clear(),
    ],
)
def test_a_manifest_that_lacks_something_is_named(tmp_path, edit):
    """By who reads it before jax is imported, and by who reads all of it."""
    manifest, _ = prepared(tmp_path, 180_000, "--vocab-size", "300")
    fields = dataclasses.asdict(manifest)
    edit(fields)
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(fields))
    options, rest = split_arguments(["--data.directory", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="manifest.json: not a manifest of this version"):
        read_config(options, "adamw", "x", rest)
    with pytest.raises(ValueError, match="manifest.json: not a manifest of this version"):
        read_manifest(tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError("no space left"), "error: no space left"), (KeyboardInterrupt, 130)],
)
def test_what_goes_wrong_outside_ends_in_one_line(tmp_path, monkeypatch, error, code):
    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr(data_pipeline, "prepare", fail)
    with pytest.raises(SystemExit) as stopped:
        run("sotu", "--directory", tmp_path)
    assert stopped.value.code == code
