"""The command that judges sets of runs."""

import pathlib

import pytest

from nanogpt.lab import look

CURVES = pathlib.Path(__file__).parents[3] / "nanogpt" / "report" / "published"


def output(capsys, *arguments):
    look.verdict([*map(str, arguments)])
    return capsys.readouterr().out


def test_two_published_results(capsys):
    names = ("t3_12_muon_3325.csv", "t3_36_muon_tuned_3250.csv")
    text = output(capsys, *(CURVES / name for name in names))
    assert "(3.28 - mean) * sqrt(n) >= 0.004" in text
    for row in (
        "| t3_12_muon_3325 | 20 | 3325 | 3.27905 | 0.00098 | 0.00426 | accepted | 3325 |",
        "| t3_36_muon_tuned_3250 | 10 | 3250 | 3.27866 | 0.00134 | 0.00424 | accepted | 3250 |",
        "| t3_36_muon_tuned_3250 | t3_12_muon_3325 | 0.00972 | A is better |",
    ):
        assert row in text


def test_another_column_and_target(capsys):
    path = CURVES / "t3_46_cwd_rowfloor_2690.csv"
    text = output(capsys, path, "--column", "val_ema_loss")
    assert "| 8 | 2690 | 3.27833 |" in text and "A is" not in text
    text = output(capsys, path, "--target", "3.27")
    assert "(3.27 - mean)" in text and "| not accepted | none |" in text
    assert "| 8 | 2765 | 3.27590 |" in text  # the last step of all runs


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (CURVES / "t3_36_muon_tuned_3250.mean.csv", "holds a mean"),
        (CURVES / "missing", "missing does not exist"),
    ],
)
def test_bad_input_is_named(capsys, path, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        output(capsys, path)
