"""The files that a run reads, and how it reads them."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import yaml

import data_pipeline
from data_pipeline import Baselines, Manifest, tokenizer, write_shard
from data_pipeline.checks import scan
from data_pipeline.manifest import Shard, Source
from nanogpt.config.prepared import fitted
from nanogpt.config.presets import preset
from nanogpt.config.run import Config
from nanogpt.lab import run_file
from nanogpt.lab.command_line import read_config, split_arguments
from nanogpt.lab.import_meta import read as read_archive
from nanogpt.report.comparison import read_runs, report
from nanogpt.report.curves import read_reference
from nanogpt.report.groups import read_groups
from nanogpt.report.verdict_tables import verdicts
from nanogpt.train.ancestors import common_checkpoint, read_params
from nanogpt.train.checkpoint import Checkpoints, plain
from nanogpt.train.digests import DamagedError
from nanogpt.train.metrics import keep_before, read_records, read_start
from nanogpt.train.record_log import RecordLog
from scripts.maintenance.faulting.fuzz import Kind, fuzz
from scripts.maintenance.faulting.outcome import Trial
from scripts.maintenance.faulting.saved import CHECKPOINTS, CRAFTED

VOCAB, TOKENS = 64, 400


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
    chance = np.random.default_rng(0)
    paths = [folder / "text_train_000001.bin", folder / "text_val_000000.bin"]
    for path in paths:
        write_shard(path, chance.integers(0, VOCAB, TOKENS).astype(np.uint16))
    return paths


def _described(folder: pathlib.Path) -> list[pathlib.Path]:
    paths = _shards(folder)
    facts = [Shard(path.name, TOKENS, 1, scan(path).sha256) for path in paths]
    source = Source("text", "1", "none", "none", "gpt2", VOCAB)
    Manifest(source, (facts[0],), (facts[1],), Baselines(128, 3.0, 4.0, 3.5)).write(folder)
    (folder / "checked.json").unlink()
    return paths


def _tokens(folder: pathlib.Path) -> dict[str, np.ndarray]:
    paths = [data_pipeline.shard_paths(folder, split)[0] for split in ("train", "val")]
    data_pipeline.check_shards(paths, VOCAB)
    if (folder / "manifest.json").exists():
        data_pipeline.read_manifest(folder).check(paths)
    sizes = {"sequence_length": 8, "rows": 4}
    batches = list(data_pipeline.val_batches(paths[1], val_tokens=128, **sizes))
    train = data_pipeline.train_batches(
        paths[:1], sequence_length=8, batch_rows=4, mode="shuffled", seed=1
    )
    with contextlib.closing(train):
        read = [*batches, *(next(train) for _ in range(2))]
    return {f"{k} {name}": x[name] for k, x in enumerate(read) for name in ("inputs", "targets")}


def _read_manifest(folder: pathlib.Path) -> Any:
    default = preset("cpu", "adamw")
    found = fitted(default, ["--data.directory", str(folder)])
    manifest = data_pipeline.read_manifest(folder)
    paths = [data_pipeline.shard_paths(folder, split)[0] for split in ("train", "val")]
    manifest.check(paths)
    return found.model.vocab_size


def _make_manifest(folder: pathlib.Path) -> list[pathlib.Path]:
    _described(folder)
    return [folder / "manifest.json"]


def _make_checked(folder: pathlib.Path) -> list[pathlib.Path]:
    _described(folder)
    _tokens(folder)
    return [folder / "checked.json"]


def _make_merges(folder: pathlib.Path) -> list[pathlib.Path]:
    module = str(tokenizer.__file__)
    packed = pathlib.Path(module).with_name("gpt2_merges.xz")
    return [pathlib.Path(shutil.copy(packed, folder / packed.name))]


def _read_merges(folder: pathlib.Path) -> bytes:
    return tokenizer.unpack((folder / "gpt2_merges.xz").read_bytes())


def _make_configs(folder: pathlib.Path) -> list[pathlib.Path]:
    text = run_file.text("cpu", "shampoo", preset("cpu", "shampoo"))
    (folder / "run.yaml").write_text(text)
    (folder / "run.json").write_text(json.dumps(yaml.safe_load(text), indent=1))
    return [folder / "run.yaml", folder / "run.json"]


def _read_configs(folder: pathlib.Path) -> list[Any]:
    found = []
    for name in ("run.yaml", "run.json"):
        options, rest = split_arguments(["--config", str(folder / name)])
        # `nanogpt train` names the optimizer that is missing.
        found.append(read_config(options, options.optimizer or "adamw", "run", rest))
    return found


def _make_metrics(folder: pathlib.Path) -> list[pathlib.Path]:
    start = {
        "config": plain(_trained(folder)),
        "fingerprint": {"shards": "s", "data": "d", "tokenizer": "t", "model": "m"}
        | {"validation": "v"},
        "versions": {"jax": "1.2.3"},
        "device": {"platform": "cpu", "kind": "abacus", "count": 1},
        **{"host": "here", "git_commit": "0123456789abcdef", "git_dirty": True},
        **{"parameters": 1000, "optimizer_state_bytes": 2000},
        "baselines": {"unigram": 5.5, "bigram": 4.25, "bytes_per_token": 3.0},
    }
    records: list[dict[str, Any]] = [{"kind": "start"} | start]
    for step in range(4):
        records.append({"kind": "train", "step": step, "loss": 3.5 - step / 8, "skipped": 0})
        val = {"kind": "val", "step": step, "loss": 3.5, "train_time_s": 0.5 * step}
        records.append(val)
    told = {"median_step_time_s": 0.5, "tokens_per_s": 1e4, "peak_memory_bytes": 1e9}
    end = {"kind": "end", "step": 4, "loss": 3.25, "train_time_s": 2.0, "compile_s": 1.0}
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, end | told]))
    (folder / "record.txt").write_text("step:1/4 val_loss:3.5 train_time:0.500s step_avg:5ms\n")
    (folder / "checkpoints" / "3").mkdir(parents=True)
    return [path, folder / "record.txt"]


def _trained(folder: pathlib.Path) -> Config:
    config = preset("cpu", "adamw")
    output = dataclasses.replace(config.output, directory=str(folder.parent))
    return dataclasses.replace(config, name=folder.name, output=output)


def _read_metrics(folder: pathlib.Path) -> Any:
    """All that a page of runs, a run that goes on, and one that begins with it make of it."""
    path, config = folder / "metrics.jsonl", _trained(folder)
    told = [report(read_runs([folder])), verdicts([folder], 3.0), read_groups([folder])]
    identity = read_start(path).get("fingerprint") or {"data": "d", "validation": "v"}
    Checkpoints(folder / "checkpoints", config, "none").check_start(path, identity)
    with contextlib.suppress(DamagedError):  # there is no whole checkpoint
        read_params(dataclasses.replace(config, init_from=str(folder)), {})
    with contextlib.suppress(DamagedError):
        common_checkpoint(dataclasses.replace(config, go_on_from=str(folder)))
    keep_before(path, 2, plain(config))
    RecordLog(folder / "record.txt", config, "source", 2)
    return told, read_records(path)


def _make_curves(folder: pathlib.Path) -> list[pathlib.Path]:
    path = folder / "curve.csv"
    path.write_text("run,step,val_loss,train_time_s\n0,0,5.0,0.0\n0,9,4.0,1.0\n1,0,7.0,0.0\n")
    return [path]


def _read_curves(folder: pathlib.Path) -> Any:
    path = folder / "curve.csv"
    return read_reference(path), verdicts([path], 3.0)


def _make_archive(folder: pathlib.Path) -> list[pathlib.Path]:
    values = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    np.savez_compressed(folder / "state.npz", **{"params/w": values, "w/block_0/step": values[0]})
    np.savez(folder / "plain.npz", **{"params/w": values})
    return [folder / "state.npz", folder / "plain.npz"]


def _read_archives(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return read_archive(folder / "state.npz") | read_archive(folder / "plain.npz")


def _plain(found: dict[str, np.ndarray]) -> bool:
    return all(value.dtype != object for value in found.values())


def _in_vocabulary(found: dict[str, np.ndarray]) -> bool:
    return all(((x >= 0) & (x < VOCAB)).all() for x in found.values())


KINDS = (
    Kind("bare shards", _shards, _tokens, sound=_in_vocabulary),
    Kind("shards with a manifest", _described, _tokens, digest=True),
    Kind("manifests", _make_manifest, _read_manifest, sound=lambda n: 1 <= n <= 1 << 16),
    Kind("checked.json", _make_checked, _tokens, digest=True),
    Kind("the tokenizer's table", _make_merges, _read_merges, digest=True),
    Kind("configs", _make_configs, _read_configs),
    Kind("metrics.jsonl", _make_metrics, _read_metrics),
    Kind("archives of import-meta", _make_archive, _read_archives, sound=_plain),
    Kind("curves", _make_curves, _read_curves),
    CHECKPOINTS,
    CRAFTED,
)


def fuzz_all(folder: pathlib.Path, count: int, seed: int) -> Iterator[Trial]:
    """Reads `count` mutants of each kind."""
    for kind in KINDS:
        yield fuzz(kind, folder / kind.name.replace(" ", "-"), count, seed)
