"""The command: what it runs, what it refuses, and that Ctrl-C loses nothing."""

import errno
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import optax
import pytest

from data_pipeline import Corpus, Document, download, read_manifest, write_shard
from nanogpt.config import presets
from nanogpt.config.presets import preset
from nanogpt.config.settings import MatrixConfig, ShampooConfig
from nanogpt.lab import command_line, data, preset_data, speedrun
from nanogpt.optimizers import build as optimizers
from nanogpt.optimizers.build import register
from nanogpt.report.verdicts import verdict_line
from nanogpt.train.metrics import read_records
from nanogpt.train.nonfinite import DivergedError
from nanogpt.train.run_folder import RunFolder

SETTINGS = """
--model.vocab-size 32 --model.num-layers 1 --model.model-dim 16 --model.head-dim 8
--model.mlp-dim 32 --model.sequence-length 8 --data.val-tokens 64 --schedule.steps 400
--val-every 100 --output.log-every 1
""".split()


@pytest.fixture
def settings(tmp_path):
    """Command line of a tiny run in tmp_path."""
    folder = tmp_path / "data"
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(0, 32, 3000).astype(np.uint16)
    write_shard(folder / "t_train_000001.bin", tokens)
    write_shard(folder / "t_val_000000.bin", tokens[:200])
    places = ["--data.directory", str(folder), "--output.directory", str(tmp_path / "runs")]
    return [*SETTINGS, *places]


@pytest.fixture
def children(monkeypatch):
    """Jobs of the processes that would be started; each leaves a short run behind."""
    started = []

    def run(job):
        started.append(job)
        _, config = job
        folder = RunFolder(config)
        folder.path.mkdir(parents=True, exist_ok=True)
        start = {
            "kind": "start",
            "fingerprint": {"data": "d", "tokenizer": "t", "model": "m", "validation": "v"},
            "config": {
                "name": config.name,
                "optimizer": config.optimizer,
                "seed": config.seed,
                "schedule": {"steps": config.schedule.steps},
            },
            "versions": {},
            "device": {"platform": "cpu", "kind": "abacus", "count": 1},
            "git_commit": None,
            "git_dirty": None,
            "parameters": 1,
            "optimizer_state_bytes": 1,
            "baselines": {},
        }
        val = [{"kind": "val", "step": s, "loss": 4.0 - s, "train_time_s": s} for s in (0, 1)]
        folder.metrics.write_text("".join(json.dumps(r) + "\n" for r in [start, *val]))

    monkeypatch.setattr(speedrun, "run", run)
    return started


def chosen(job: speedrun.Job) -> tuple[str, str, bool]:
    """(optimizer, name, resume) of a child's job."""
    choice, config = job
    assert config.optimizer == choice.optimizer
    return config.optimizer, config.name, choice.resume


def test_three_optimizers_and_a_picture(settings, children, tmp_path, capsys):
    speedrun.main([*settings, "--seed", "5"])
    assert [chosen(arguments) for arguments in children] == [
        (name, f"cpu/{name}", False) for name in ("adamw", "muon", "shampoo_next")
    ]
    picture = tmp_path / "runs" / "cpu" / "comparison.png"
    assert picture.exists()
    printed = capsys.readouterr().out
    assert f"picture: {picture}" in printed
    assert "| Shampoo (recipe) |" in printed


def test_name_is_the_folder_of_all_three(settings, children, tmp_path):
    speedrun.main([*settings, "--name", "mine"])
    assert [chosen(arguments)[1] for arguments in children] == [
        f"mine/{name}" for name in ("adamw", "muon", "shampoo_next")
    ]
    assert (tmp_path / "runs" / "mine" / "comparison.md").exists()


def test_resume_goes_on_with_what_exists_and_starts_the_rest(settings, children, tmp_path):
    (tmp_path / "runs" / "cpu" / "adamw").mkdir(parents=True)
    (tmp_path / "runs" / "cpu" / "adamw" / "metrics.jsonl").write_text("{}\n")
    speedrun.main([*settings, "--resume"])
    assert [chosen(arguments)[2] for arguments in children] == [True, False, False]


def test_nothing_starts_where_a_run_would_be_lost(settings, children, tmp_path):
    (tmp_path / "runs" / "cpu" / "shampoo_next" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit, match="cpu/shampoo_next already holds a run: go on"):
        speedrun.main(settings)
    assert children == []


def test_nothing_to_resume(settings, children):
    with pytest.raises(SystemExit, match="nothing to resume"):
        speedrun.main([*settings, "--resume"])
    assert children == []


def test_settings_of_one_optimizer_are_refused_for_all(settings, children):
    with pytest.raises(SystemExit, match="--matrices.cutoff is about one optimizer: name"):
        speedrun.main([*settings, "--matrices.cutoff", "positive"])
    assert children == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "sgd"], "optimizer='sgd' is unknown"),
        (["--preset", "track3", "--optimizer", "sgd"], "unknown in preset 'track3'"),
        (["--model.head-dim", "7"], "head_dim=7 does not divide"),
        (["--schedule.steps", "0"], "steps=0: must be at least 1"),
        (["--name", "../elsewhere"], "name='../elsewhere': must be a folder inside"),
    ],
)
def test_impossible_settings_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        speedrun.main(arguments)
    assert message in f"{stopped.value} {capsys.readouterr().err}"


def test_every_setting_can_be_set_and_is_explained(capsys):
    rest = "--schedule.steps 7 --matrices.learning-rate 0.5 --matrices.cutoff positive".split()
    options, rest = command_line.split_arguments(["--optimizer", "shampoo", *rest])
    config = command_line.read_config(options, "shampoo", "x", rest)
    assert (config.name, config.schedule.steps) == ("x", 7)
    assert isinstance(config.matrices, ShampooConfig)
    assert (config.matrices.learning_rate, config.matrices.cutoff) == (0.5, "positive")
    with pytest.raises(SystemExit):
        speedrun.main(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for wanted in ("--preset", "--resume", "--overwrite", "steps between validations", "tokens"):
        assert wanted in text
    assert "--optimizer shampoo --help" in text


@pytest.fixture
def demo_folder(tmp_path, monkeypatch):
    """Prepares a run's data in tmp_path, where the demo text is a small one."""
    documents = [
        Document(f"{i}", "We the people. " * 20, "val" if i < 2 else "train") for i in range(6)
    ]
    corpus = Corpus("tiny", "1", "none", "first two", lambda: iter(documents))
    monkeypatch.setattr(preset_data, "sotu", lambda: corpus)
    monkeypatch.chdir(tmp_path)

    def prepare(*arguments):
        options, rest = command_line.split_arguments(["--data.val-tokens", "64", *arguments])
        preset_data.prepare_data(command_line.read_config(options, "adamw", "x", rest))

    return prepare


def test_seeds_of_one_optimizer_and_the_verdict(settings, children, capsys):
    speedrun.main([*settings, "--optimizer", "muon", "--seeds", "2", "--target", "3.1"])
    runs = []
    for choice, config in children:
        runs.append((config.optimizer, config.name, config.seed, choice.seeds))
    assert runs == [("muon", f"cpu/muon/seed-{n}", n, 2) for n in (0, 1)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cpu/muon/seed-0: final loss 3.00000, log ")
    assert lines[2].startswith("accepted: mean 3.00000, std 0.00000, n=2: (3.1 - mean)")


def test_finished_seeds_are_kept_and_more_are_added(settings, children, tmp_path):
    command = [*settings, "--optimizer", "muon", "--name", "mine", "--seeds"]
    speedrun.main([*command, "1"])
    with pytest.raises(SystemExit, match="mine/seed-0 already holds a run"):
        speedrun.main([*command, "2"])
    speedrun.main([*command, "2", "--resume"])
    assert [chosen(arguments)[1:] for arguments in children] == [
        ("mine/seed-0", False),
        ("mine/seed-0", True),
        ("mine/seed-1", False),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "2"], "--seeds is about one optimizer: name it by --optimizer"),
        (["--optimizer", "muon", "--seeds", "0"], "seeds=0: .*at least 1"),
        (["--optimizer", "muon", "--seeds", "2", "--seed", "5"], "seed=5: .*leave --seed out"),
    ],
)
def test_impossible_numbers_of_seeds(settings, children, arguments, message):
    with pytest.raises(SystemExit, match=message):
        speedrun.main([*settings, *arguments])
    assert children == []


def test_a_loss_that_is_not_finite_proves_nothing(settings):
    options, rest = command_line.split_arguments(
        [*settings, "--optimizer", "muon", "--target", "3"]
    )
    config = command_line.read_config(options, "muon", "a", rest)
    folder = RunFolder(config)
    folder.path.mkdir(parents=True)
    folder.metrics.write_text('{"kind": "start", "config": {}}\n{"kind": "end", "loss": null}\n')
    assert "not accepted: mean nan" in speedrun.results(options, [config])


def test_a_full_disk_is_said_in_one_line(settings, monkeypatch):
    def fail(job):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(speedrun, "train", fail)
    with pytest.raises(SystemExit, match="disk is full: .* --resume"):
        speedrun.main([*settings, "--optimizer", "muon"])


def test_track3_downloads_the_shards_that_its_steps_take(tmp_path, monkeypatch, capsys):
    """A folder stands in for the hub, with short shards."""
    monkeypatch.setattr(download, "SHARD_TOKENS", 3000)
    monkeypatch.chdir(tmp_path)
    fetched = []

    def fetch(*, filename, local_dir, **names):
        fetched.append(filename)
        write_shard(f"{local_dir}/{filename}", np.arange(3000, dtype=np.uint16))

    monkeypatch.setattr(preset_data, "fineweb", functools.partial(download.fineweb, fetch=fetch))
    config = preset("track3", "shampoo")
    preset_data.prepare_data(config)
    numbers = [f"fineweb_train_{n:06d}.bin" for n in range(1, 19)]
    assert fetched == ["fineweb_val_000000.bin", *numbers]
    assert "3375 steps need 18 training shards and one" in capsys.readouterr().out
    preset_data.prepare_data(config)  # nothing is missing any more
    assert len(fetched) == 19 and capsys.readouterr().out == ""


def test_demo_text_is_prepared_only_in_its_own_folder(demo_folder, tmp_path, monkeypatch):
    scored = []
    monkeypatch.setattr(preset_data, "prepare", lambda *a, **k: scored.append((a[1], k)))
    options, rest = command_line.split_arguments([])
    preset_data.prepare_data(command_line.read_config(options, "adamw", "x", rest))
    assert scored == [("data/sotu", {"val_tokens": preset("cpu", "adamw").data.val_tokens})]
    demo_folder("--data.directory", "elsewhere")  # a typing error must not become a corpus
    assert len(scored) == 1 and not (tmp_path / "elsewhere").exists()


def test_demo_folder_always_fits_the_run(demo_folder, tmp_path, capsys):
    """Baselines are those of the run's val_tokens."""

    def made():
        manifest = read_manifest(tmp_path / "data" / "sotu")
        return manifest.source.vocab_size, manifest.baselines.val_tokens

    demo_folder()
    assert made() == (2048, 64)
    assert "preparing text in data/sotu" in capsys.readouterr().out
    demo_folder("--data.val-tokens", "32")
    assert made() == (2048, 32)
    assert capsys.readouterr().out == ""


def test_a_folder_that_other_runs_read_is_not_replaced(demo_folder, tmp_path):
    refused = r"vocab_size=300.*data sotu --directory data/sotu-300 --vocab-size 300.*set --data"
    with pytest.raises(ValueError, match=refused):
        demo_folder("--model.vocab-size", "300")
    assert not (tmp_path / "data").exists()
    demo_folder()
    with pytest.raises(ValueError, match=refused):
        demo_folder("--model.vocab-size", "300")
    assert read_manifest(tmp_path / "data" / "sotu").source.vocab_size == 2048
    with pytest.raises(SystemExit, match=refused):
        data.main(["sotu", "--vocab-size", "300"])


def test_seeds_of_an_optimizer_of_ones_own(settings, tmp_path, monkeypatch, capsys):
    """Trained in this process, the only one that knows it."""
    monkeypatch.setattr(optimizers, "REGISTRY", dict(optimizers.REGISTRY))
    monkeypatch.setattr(presets, "OWN", {})
    register("own", lambda settings, _: optax.scale_by_sign(), MatrixConfig(0.002, 0.1))
    short = ["--schedule.steps", "2", "--optimizer", "own", "--seeds", "2"]
    speedrun.main([*settings, *short])
    assert re.search(r"mean \d.\d+, std 0.\d+, n=2", capsys.readouterr().out)


def test_overwriting_the_first_run_of_a_group_clears_the_others(
    settings, children, tmp_path, monkeypatch
):
    """A Ctrl-C in the first run must not leave a new run beside old ones, for --resume to mix."""
    speedrun.main(settings)
    shampoo = tmp_path / "runs" / "cpu" / "shampoo_next" / "metrics.jsonl"
    leave_a_run, fails = speedrun.run, True

    def stopped(arguments):
        if not fails:
            leave_a_run(arguments)
        sys.exit(130)

    monkeypatch.setattr(speedrun, "run", stopped)
    with pytest.raises(SystemExit):
        speedrun.main([*settings, "--overwrite"])
    assert shampoo.exists()  # the first run turned out to be impossible: nothing is lost
    fails = False
    with pytest.raises(SystemExit):
        speedrun.main([*settings, "--overwrite"])
    assert not shampoo.exists()
    assert (tmp_path / "runs" / "cpu" / "adamw" / "metrics.jsonl").exists()


def test_track3_without_an_accelerator_is_warned_about(capsys):
    speedrun.warn_without_accelerator("cpu")
    assert capsys.readouterr().err == ""
    speedrun.warn_without_accelerator("track3")
    (line,) = capsys.readouterr().err.splitlines()
    assert "only a CPU" in line and "make venv EXTRAS=cuda12" in line


def test_failed_child_ends_the_command(settings, tmp_path):
    settings = [*settings, "--data.directory", str(tmp_path / "none")]
    with pytest.raises(SystemExit, match=r"error: .*none: no \*_train_\*.bin shard"):
        speedrun.main([*settings, "--optimizer", "adamw", "--seeds", "1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: muon", "names the optimizer muon, which `nanogpt train` trains"),
        (
            "matrices: {learning_rate: 1.0}",
            "--matrices.learning-rate is about one optimizer: name",
        ),
    ],
)
def test_a_file_about_one_optimizer_is_none_for_the_demo(
    settings, children, tmp_path, text, message
):
    (tmp_path / "run.yaml").write_text(text)
    command = [*settings, "--config", str(tmp_path / "run.yaml")]
    with pytest.raises(SystemExit, match=message):
        speedrun.main(command)
    assert children == []


def measured(path) -> list[tuple]:
    """What a metrics file says, apart from times."""
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [(r["kind"], r["step"], r["loss"]) for r in records if "loss" in r]


def test_ctrl_c_and_resume_in_real_processes(settings, tmp_path, monkeypatch):
    """The whole command is interrupted in its first run, which then goes on bit for bit."""
    command = [sys.executable, "-m", "nanogpt", "demo", *settings]
    metrics = tmp_path / "runs" / "cpu" / "adamw" / "metrics.jsonl"
    with (tmp_path / "errors").open("w") as errors:
        whole = subprocess.Popen(command, stderr=errors)
        while not (metrics.exists() and '"step": 3,' in metrics.read_text()):
            assert whole.poll() is None, (tmp_path / "errors").read_text()
            time.sleep(0.01)
        whole.send_signal(signal.SIGINT)
        code = whole.wait()
    message = (tmp_path / "errors").read_text()
    assert code == 130, message
    assert "stopped by SIGINT after" in message and "--resume" in message
    assert 4 <= len(measured(metrics)) < 400
    for options in (["--resume"], ["--name", "straight"]):
        speedrun.main([*settings, "--optimizer", "adamw", *options])
    assert measured(metrics) == measured(tmp_path / "runs" / "straight" / "metrics.jsonl")


# Lines of the published log of result #35, for the layout alone.
PUBLISHED = """\
step:0/3375 val_loss:10.82584 train_time:0.000s step_avg:nanms
step:125/3375 val_loss:4.81815 train_time:52.990s step_avg:423.92ms
step:3375/3375 val_loss:3.27675 train_time:1633.268s step_avg:478.74ms
""".splitlines()


def layout(line: str) -> str:
    """A pattern of the lines that differ from this one in digits, not in numbers of decimals."""

    def pattern(number: re.Match) -> str:
        return r"\d+" + (rf"\.\d{{{len(number[2])}}}" if number[2] else "")

    return re.sub(r"(\d+)\.?(\d+)?", pattern, line)


def test_track3_from_shards_to_the_verdict(tmp_path):
    """The benchmark's command, a tiny model: two seeds, their logs line by line, the verdict."""
    random = np.random.default_rng(0)
    for name, count in (("train_000001", 300), ("train_000002", 300), ("val_000000", 200)):
        tokens = random.integers(0, 64, count).astype(np.uint16)
        write_shard(tmp_path / f"fineweb_{name}.bin", tokens)
    settings = f"""
    --preset track3 --optimizer shampoo --seeds 2 --target 9
    --model.vocab-size 64 --model.num-layers 1 --model.model-dim 16 --model.head-dim 8
    --model.mlp-dim 32 --model.sequence-length 8 --data.batch-rows 8 --data.microbatch-rows 4
    --data.val-tokens 128 --schedule.steps 5 --val-every 2 --val-every-final 1
    --data.directory {tmp_path} --output.directory {tmp_path}/runs
    """.split()
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1",
    }
    command = [sys.executable, "-m", "nanogpt", "train", *settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    finals = []
    for seed in (0, 1):
        folder = tmp_path / "runs" / "track3" / "shampoo" / f"seed-{seed}"
        source, machine, lines = (folder / "record.txt").read_text().split(f"\n{'=' * 100}\n")
        assert source.startswith("# ==== nanogpt/__init__.py ====\n")
        assert "with world_size 1\n" in machine and f'"seed": {seed},' in machine
        assert [line.split("/")[0] for line in lines.splitlines()] == [
            f"step:{step}" for step in (0, 2, 4, 5)
        ]
        for line, published in zip(lines.splitlines(), [*PUBLISHED, PUBLISHED[1]], strict=True):
            assert re.fullmatch(layout(published), line), (line, layout(published))
        assert f"step:0/5 val_loss:{math.log(64):.5f} train_time:0.000s" in lines
        val = [r for r in read_records(folder / "metrics.jsonl") if r["kind"] == "val"]
        assert [f"{r['loss']:.5f}" for r in val] == re.findall(r"val_loss:(\S+)", lines)
        finals.append(val[-1]["loss"])
    assert finals[0] != finals[1]
    assert done.stdout.splitlines()[-2:] == [
        "published: 3.27666 after 3375 steps, n=2 (#35)",
        verdict_line(finals, 9),
    ]
    assert done.stdout.count("accepted") == 1  # not for each seed by itself


@pytest.mark.parametrize("target", ["nan", "0", "inf"])
def test_a_target_that_nothing_proves(target, capsys):
    with pytest.raises(SystemExit):
        command_line.split_arguments(["--target", target])
    assert "must be positive and finite" in capsys.readouterr().err


def test_a_diverged_run_ends_with_a_status_of_its_own(settings, monkeypatch, capsys):
    def diverge(*arguments, **options):
        raise DivergedError("diverged: the gradients of steps 1 to 10 are not finite.")

    monkeypatch.setattr("nanogpt.train.loop.fit", diverge)
    with pytest.raises(SystemExit) as ended:
        speedrun.main([*settings, "--optimizer", "adamw"])
    assert ended.value.code == 3
    assert "error: diverged: the gradients of steps 1 to 10" in capsys.readouterr().err
