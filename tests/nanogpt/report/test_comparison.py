"""The table and what the picture is drawn from."""

import json
import math
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from nanogpt.report.comparison import MOST, baselines, compare, figure_of, named, report
from nanogpt.report.runs import read_run

STEPS = (0, 10, 20, 30)
CURVES = {  # validation losses at STEPS
    "adamw": (6.0, 5.0, 4.5, 4.0),
    "muon": (6.0, 4.5, 3.5, 3.0),
    "shampoo": (6.0, 5.5, 4.2, 3.8),
}


def write_run(folder, optimizer, losses, *, name=None, finished=True, known=True, seed=7):
    start = {
        "kind": "start",
        "fingerprint": {"data": "d", "tokenizer": "t", "model": "m", "validation": "v"},
        "host": "here",
        "config": {
            "name": name or optimizer,
            "optimizer": optimizer,
            "seed": seed,
            "schedule": {"steps": STEPS[-1]},
        },
        "versions": {"jax": "1.2.3"},
        "device": {"platform": "cpu", "kind": "abacus", "count": 1},
        "git_commit": "0123456789abcdef",
        "git_dirty": True,
        "parameters": 1234567,
        "optimizer_state_bytes": 2_500_000,
        "baselines": {"unigram": 5.5, "bigram": 4.25, "bytes_per_token": 3.0} if known else {},
    }
    records: list[dict[str, Any]] = [start]
    for step, loss in zip(STEPS, losses, strict=False):
        records.append({"kind": "train", "step": step, "loss": 0.0})
        records.append({"kind": "val", "step": step, "loss": loss, "train_time_s": 0.2 * step})
    if finished:
        records.append(
            {
                "kind": "end",
                "loss": losses[-1],
                "bits_per_byte": 1.75,
                "train_time_s": 6.0,
                "median_step_time_s": 0.19,
                "tokens_per_s": 12345.0,
                "compile_s": 8.8,
                "peak_memory_bytes": 7.5e8,
            }
        )
    folder.mkdir(parents=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text)
    return folder


@pytest.fixture
def folders(tmp_path):
    return [write_run(tmp_path / name, name, losses) for name, losses in CURVES.items()]


def cells(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_table(folders):
    rows = cells(report([read_run(folder) for folder in folders]))
    assert rows[0][:5] == [
        *("optimizer", "steps", "final loss (nats/token)", "bits/byte"),
        "steps to AdamW's final loss",
    ]
    rest = ["6.0", "190.0", "12,345", "750", "2.5", "8.8"]
    assert rows[2:] == [
        ["AdamW", "30", "4.0000", "1.7500", "30", *rest],
        ["Muon", "30", "3.0000", "1.7500", "15", *rest],  # half-way from 4.5 to 3.5
        ["Shampoo", "30", "3.8000", "1.7500", "25", *rest],  # half-way from 4.2 to 3.8
    ]


def test_machine_baselines_and_commit_are_told_once(folders):
    text = report([read_run(folder) for folder in folders])
    assert "unigram 5.5000, bigram 4.2500" in text
    assert text.count("abacus") == 1
    assert "0123456789ab with local changes" in text
    assert "jax 1.2.3" in text and "1,234,567" in text


def test_unfinished_run_has_dashes(tmp_path):
    run = read_run(write_run(tmp_path / "a", "muon", (6.0, 5.0), finished=False))
    assert cells(report([run]))[2] == [
        *("Muon", "10 of 30", "5.0000", "-", "-", "2.0", "-", "-", "-", "2.5", "-")
    ]


def test_diverged_run_is_drawn_and_listed(tmp_path, folders):
    diverged = write_run(tmp_path / "bad", "soap", (6.0, None, None, None))
    out = tmp_path / "a" / "out"
    picture = compare([*folders, diverged], out)
    assert cells((out / "comparison.md").read_text())[-1][2] == "diverged"
    for path in (picture, out / "comparison-dark.png"):
        height, width, _ = matplotlib.image.imread(path).shape
        assert width == 960 and height > 1000


def test_a_diverged_adamw_is_no_target_for_the_others(tmp_path, folders):
    """min([nan, 4.0]) is nan, and so would be nobody's number of steps."""
    diverged = write_run(tmp_path / "bad", "adamw", (6.0, None, None, None), name="bad")
    rows = cells(report([read_run(folder) for folder in [diverged, *folders]]))
    assert [row[4] for row in rows[2:]] == ["-", "30", "15", "25"]
    rows = cells(report([read_run(folder) for folder in [diverged, folders[1]]]))
    assert [row[4] for row in rows[2:]] == ["-", "-"]


def test_runs_of_one_optimizer_are_told_apart(tmp_path, folders):
    again = write_run(tmp_path / "again", "muon", CURVES["muon"], name="seed1")
    told = report(named([read_run(folder) for folder in [*folders, again]]))
    labels = [row[0] for row in cells(told)[2:]]
    assert labels == ["AdamW", "Muon muon", "Shampoo", "Muon seed1"]


def test_names_that_cannot_be_written_are(tmp_path, folders):
    odd = write_run(tmp_path / "odd", "muon", CURVES["muon"], name="a\ud800\n| b")
    told = report(named([read_run(folder) for folder in [*folders, odd]]))
    assert "| Muon a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}| b |" in told


def test_baselines_need_agreement(tmp_path, folders):
    runs = [read_run(folder) for folder in folders]
    assert baselines(runs) == {"unigram": 5.5, "bigram": 4.25}
    other = read_run(write_run(tmp_path / "other", "soap", CURVES["muon"], known=False))
    assert baselines([*runs, other]) == baselines([other, *runs]) == {}


def titles(figure):
    return [text.get_text() for text in figure.texts]


def test_the_title_names_optimizers_data_model_and_seeds(tmp_path, folders):
    runs = [read_run(folder) for folder in folders]
    sizes = {"num_layers": 2, "model_dim": 64, "sequence_length": 128}
    for run in runs:
        run.start["config"] |= {"model": sizes, "data": {"directory": "data/x", "batch_rows": 8}}
    above = titles(figure_of(runs))
    assert above[0].strip() == "Validation loss of AdamW, Muon, Shampoo"
    assert above[1] == (
        "data/x, GPT of 2 layers, 64 wide, 1.2M parameters\n30 steps, 8 x 128 tokens a step, seed 7"
    )


def test_seeds_of_one_setting_are_one_curve_and_a_repeated_one_another(tmp_path, folders):
    for seed in (8, 9):
        write_run(tmp_path / f"s{seed}", "muon", CURVES["muon"], name=f"s{seed}", seed=seed)
    again = write_run(tmp_path / "again", "muon", CURVES["muon"], name="again")
    paths = [*folders, tmp_path / "s8", tmp_path / "s9", again]
    figure = figure_of([read_run(path) for path in paths])
    words = [text.get_text() for text in figure.axes[0].texts if "gram" not in text.get_text()]
    assert words == ["AdamW 4.000", "Muon muon 3.000", "Shampoo 3.800", "Muon again 3.000"]
    assert len(figure.axes[0].collections) == 1
    assert "seeds 7, 8, 9" in titles(figure)[1] and "± 95 %" in titles(figure)[1]


def test_a_target_is_that_of_the_user_or_adamws(folders):
    runs = [read_run(folder) for folder in folders]
    assert figure_of(runs).axes[-1].get_xlabel() == "steps to 4.000, AdamW's final loss"
    assert figure_of(runs, target=4.5).axes[-1].get_xlabel() == "steps to 4.500, the target"
    assert cells(report(runs, 4.5))[0][4] == "steps to 4.5"
    assert len(figure_of(runs[1:]).axes) == 2  # no AdamW, nothing to reach


def test_many_settings_are_a_board_of_dots(tmp_path, folders):
    more = [
        write_run(tmp_path / f"m{k}", "muon", CURVES["muon"], name=f"m{k}") for k in range(MOST)
    ]
    curve = read_run(folders[0]).curve._replace(label="published")
    runs = [read_run(folder) for folder in [*folders, *more]]
    figure = figure_of(runs, note="unchecked: x", references=[curve])
    assert figure.axes[0].get_xlabel() == "final loss, less AdamW's"
    rows = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(rows) == MOST + 4 and rows[-1] == "published"
    assert "unchecked: x" in titles(figure)[1]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda folder: None, FileNotFoundError, "is not the folder of a run"),
        (
            lambda folder: write_run(folder, "muon", (), finished=False),
            ValueError,
            "holds no validation",
        ),
    ],
)
def test_folders_without_a_run_are_named(tmp_path, make, error, message):
    make(tmp_path / "a")
    with pytest.raises(error, match=f"a/metrics.jsonl .*{message}"):
        compare([tmp_path / "a"], tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]\n", "line 1 is no record"),
        ("3\n{}\n", "line 1 is no record"),
        (
            '{"kind": "start"}\n{"kind": "val"}\n',
            r"not as .* writes it \(KeyError: 'step'\)",
        ),
        ("\xff\n{}\n", "line 1 is not JSON"),
    ],
)
def test_what_is_no_metrics_file_is_named(tmp_path, text, message):
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=f"metrics.jsonl.*{message}"):
        read_run(tmp_path)


def test_nothing_to_compare(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        compare([], tmp_path)


def test_null_losses_become_nan(tmp_path):
    run = read_run(write_run(tmp_path / "a", "muon", (6.0, None, 5.0, 4.0)))
    assert math.isnan(run.curve.losses[1]) and np.nanmin(run.curve.losses) == 4.0
