"""The medium board: what is trained, its table, its picture."""

import statistics

import matplotlib.image
import pytest

from nanogpt.config.presets import PRESETS, preset
from scripts.maintenance import medium_board
from scripts.maintenance.medium_board import NAME, small_board, train

BOARD = """| optimizer | n | steps | final loss |
|-|-|-|-|
| adamw | 3 | 300 | 3.6000 |
| muon_track3 | 3 | 300 | 3.5000 |
"""


@pytest.fixture
def trained(monkeypatch):
    """Losses whose best rate is four times the preset's, a little more for later seeds."""
    trials = []

    def run(made, path, *, run):
        del path, run
        trials.extend(made)
        found = []
        for _, config in made:
            name = config.optimizer
            ratio = config.matrices.learning_rate / preset(NAME, name).matrices.learning_rate
            loss = 3.8 + abs(ratio - 4) / 10 + config.seed / 1e4 + 0.1 * (name == "adamw")
            found.append({"status": "finished", "loss": loss})
        return found

    monkeypatch.setattr(medium_board, "run_trials", run)
    monkeypatch.setattr(medium_board, "prepare_data", lambda config: None)
    return trials


def test_an_entry_is_tuned_from_one_seed_and_judged_on_three_others(trained, tmp_path):
    entry = train("adamw", tmp_path)
    assert sorted(entry.tuned) == [-1, 0, 1, 2, 3]
    assert [t.config.seed for t in trained] == [100] * 5 + [0, 1, 2]
    assert {t.config.model.kind for t in trained} == {"medium"}
    best = 4 * preset(NAME, "adamw").matrices.learning_rate
    assert [t.config.matrices.learning_rate for t in trained[-3:]] == [best] * 3
    assert {t.config.data.seed for t in trained[-3:]} == {0, 1, 2}
    assert entry.losses == pytest.approx([3.9, 3.9001, 3.9002])


def test_table_and_picture_stand_beside_the_small_board(trained, tmp_path, capsys):
    (tmp_path / "board.md").write_text(BOARD)
    words = ["--entries", "adamw", "muon_track3", "--small", str(tmp_path / "board.md")]
    medium_board.main([str(tmp_path), *words, "--out", str(tmp_path)])
    table = capsys.readouterr().out
    std = f"{statistics.stdev([0, 1e-4, 2e-4]):.4f}"
    assert f"| muon_track3 | 3.8001 | {std} | 0.05 | 3.5000 | 1 |" in table
    assert table.index("muon_track3") < table.index("adamw")  # best first
    for name in ("medium_board.png", "medium_board-dark.png"):
        assert matplotlib.image.imread(tmp_path / name).std() > 0.01


def test_the_small_board_is_the_packages_page():
    losses = small_board(medium_board.Path("docs/leaderboard/board.md"))
    assert set(losses) <= set(PRESETS["board"]) and 3 < losses["adamw"] < 4
