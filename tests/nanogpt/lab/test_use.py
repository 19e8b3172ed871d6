"""The commands that use a trained model, on runs of a few steps."""

import dataclasses
import re
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import data_pipeline
from data_pipeline import folder, gpt2, prepare
from nanogpt import cli
from nanogpt.config.presets import preset
from nanogpt.config.run import TailConfig
from nanogpt.train.ancestors import params_of
from nanogpt.train.evaluation import _summary
from nanogpt.train.loop import fit
from nanogpt.train.metrics import read_records
from nanogpt.train.train_step import model_structure
from nanogpt.train.trained import read_trained
from tests.oracles import exported

WORDS = "we hold these truths to be self-evident that all people are created equal".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two runs on real shards; the second is monitored and validates averaged weights."""
    place = tmp_path_factory.mktemp("use")
    (place / "texts").mkdir()
    random = np.random.default_rng(0)
    for name in range(20):
        text = " ".join(random.choice(WORDS, 300)) + " \N{SNOWMAN}"
        (place / "texts" / f"{name}.txt").write_text(text, encoding="utf-8")
    prepare(folder(place / "texts"), place / "data", gpt2(300), val_tokens=512)
    base = preset("cpu", "adamw")
    config = dataclasses.replace(
        base,
        name="plain",
        model=dataclasses.replace(
            base.model,
            vocab_size=320,
            num_layers=1,
            model_dim=16,
            head_dim=8,
            mlp_dim=32,
            sequence_length=32,
        ),
        data=dataclasses.replace(
            base.data,
            directory=str(place / "data"),
            batch_rows=8,
            microbatch_rows=4,
            val_tokens=512,
        ),
        schedule=dataclasses.replace(base.schedule, steps=12),
        output=dataclasses.replace(base.output, directory=str(place), checkpoint_every=8),
    )
    fit(config)
    tail = TailConfig(start=4, tau=3.0, share=0.9)
    settings: Any = preset("cpu", "shampoo").matrices
    shampoo: Any = {
        "optimizer": "shampoo",
        "matrices": dataclasses.replace(settings, monitor=4),
    }
    fit(dataclasses.replace(config, name="averaged", tail=tail, **shampoo))
    return place


def said(capsys, *words):
    capsys.readouterr()
    cli.main([str(word) for word in words])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["plain", "averaged"])
def test_evaluation_of_the_runs_own_text_is_its_last_validation(place, capsys, name):
    told = said(capsys, "evaluate", place / name)
    end = read_records(place / name / "metrics.jsonl")[-1]
    loss, error = map(float, re.search(r"loss +(\S+) \+- (\S+)", told).groups())
    bits = float(re.search(r"byte +(\S+)", told)[1])
    assert loss == pytest.approx(end["loss"], abs=6e-5)
    assert bits == pytest.approx(end["bits_per_byte"], abs=6e-5)
    assert 0 < error < 0.5 and "12 updates, 512 tokens" in told


def test_any_shards_and_any_checkpoint_are_scored(place, capsys):
    """Rows that fill no microbatch count as well; several shards are one text."""
    shard = next((place / "data").glob("*_train_*.bin"))
    size = data_pipeline.open_tokens(shard).size
    told = said(capsys, "evaluate", place / "plain", "--data", shard, "--step", 8)
    assert f"8 updates, {(size - 1) // 32 * 32:,} tokens" in told
    both = said(capsys, "evaluate", place / "plain", "--data", shard, shard, "--step", 8)
    assert re.search("loss +(\\S+)", both)[1] == re.search("loss +(\\S+)", told)[1]
    some = said(capsys, "evaluate", place / "plain", "--data", place / "data", "--tokens", 100)
    assert "12 updates, 96 tokens" in some


def test_standard_error_and_bits():
    found = _summary(np.array([3.0, 5.0, 4.0, 8.0]), 2, 16)
    assert found.tokens == 8 and found.loss == 2.5
    means = np.array([1.5, 2.5, 2, 4])
    assert found.standard_error == pytest.approx(means.std(ddof=1) / 2)
    assert found.bits_per_byte == pytest.approx(20 / np.log(2) / 16)
    assert found.bits_standard_error / found.standard_error == pytest.approx(0.5 / np.log(2))
    assert np.isnan(_summary(np.array([3.0]), 2, 0).bits_per_byte)  # ends of texts alone


def test_text_goes_on_from_a_prompt(place, capsys):
    words = ("sample", place / "plain", "--prompt", "we hold \N{SNOWMAN}", "--seed", 1)
    text = said(capsys, *words, "--tokens", 60)
    assert text.startswith("we hold \N{SNOWMAN}") and len(text) > 30
    assert said(capsys, *words, "--tokens", 60) == text
    assert text.startswith(
        said(capsys, *words, "--tokens", 5).rstrip("\n\N{REPLACEMENT CHARACTER}")
    )


@pytest.mark.parametrize("name", ["plain", "averaged"])
def test_exported_weights_give_the_same_logits_elsewhere(place, tmp_path, capsys, name):
    told = said(capsys, "export", place / name, "--out", tmp_path / "out")
    assert str(tmp_path / "out" / "model.safetensors") in told
    trained = read_trained(str(place / name))
    tokens = np.random.default_rng(1).integers(0, 300, 32)
    ours = nnx.merge(model_structure(trained.config.model), trained.params)(tokens[None])[0]
    theirs = exported.logits(*exported.read(tmp_path / "out"), tokens)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)
    raw = params_of(place / name / "checkpoints" / "12", jax.tree.map(np.asarray, trained.params))
    same = all(jax.tree.leaves(jax.tree.map(np.array_equal, raw, trained.params)))
    assert same == (name == "plain")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["sample", "plain", "--temperature", "-1"], "temperature=-1.0: at least 1, and at least"),
        (["sample", "plain", "--top-k", "0"], "top_k=0: at least 1"),
        (["sample", "plain", "--seed", "-1"], "seed=-1: at least 0"),
        (["sample", "plain", "--prompt", "\udcff"], r"prompt='\\udcff': is no UTF-8"),
        (["evaluate", "plain", "--data", "gs://b/c"], "data='gs://b/c': must be a folder of this"),
        (["sample", "nameless"], "no manifest.json, so nobody knows its tokenizer"),
        (["evaluate", "plain", "--tokens", "8"], "less than a row of 32 tokens"),
        (["evaluate", "plain", "--step", "3"], "step=3: .* has checkpoints of the steps 8, 12"),
        (["evaluate", "plain", "--data", "nowhere.bin"], "nowhere.bin"),
        (["evaluate", "plain", "--data", "other"], "vocabulary of 400, the run with one of 300"),
        (["export", "plain", "--out", "gs://b/c"], "must be a folder of this machine"),
        (["export", "texts"], "holds no run with checkpoints"),
        (["sample", "changed"], "metrics.jsonl is not as this version writes it"),
        (["export", "medium"], "a model of kind='medium': nanogpt sample, evaluate and export"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(place, monkeypatch, words, complaint):
    monkeypatch.chdir(place)
    if "other" in words:
        prepare(folder("texts"), "other", gpt2(400), val_tokens=100)
    changes = {"changed": ('"mlp_dim"', '"width"'), "nameless": ('"tokenizer"', '"other"')}
    of_medium = '"kind": "medium", "init": "medium", "num_layers": 16, "sequence_length": 128, '
    of_medium += '"end_of_text": 0'
    changes["medium"] = ('"end_of_text": 50256', of_medium)  # the last of equal names counts
    for name in changes.keys() & set(words):
        shutil.copytree("plain", name)
        path = place / name / "metrics.jsonl"
        path.write_text(path.read_text().replace(*changes[name]))
    with pytest.raises(SystemExit, match=f"error: .*{complaint}"):
        cli.main(words)


def test_a_monitored_run_can_be_drawn(place, tmp_path, capsys):
    records = read_records(place / "averaged" / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "spectra"] == [0, 3, 7, 11]
    told = said(capsys, "spectrum", place / "averaged", "--out", tmp_path)
    assert "| blocks/0/attn/q | inputs | 16 of 16 |" in told
    assert (tmp_path / "spectrum.png").exists() and (tmp_path / "spectrum_map.png").exists()
