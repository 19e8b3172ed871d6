"""What the picture of a comparison holds, read off the figure itself."""

import math

import numpy as np
import pytest

from nanogpt.report.curves import Curve
from nanogpt.report.figures import comparison_figure, steps_row, training_figure
from nanogpt.report.groups import Group

STEPS = (0, 10, 20)


def runs(label, *losses):
    return [Curve(f"{label}{i}", STEPS, loss, (0.0, 5.0, 10.0)) for i, loss in enumerate(losses)]


MUON = Group("Muon", runs("m", (6.0, 4.0, 3.0), (6.0, 4.4, 3.4)))
ADAMW = Group("AdamW", runs("a", (6.0, 5.0, 4.0)))
LOST = Group("lion", runs("l", (6.0, 5.0, math.nan)))
HALF = Group("soap (1 diverged)", runs("s", (6.0, 4.0, 3.5), (6.0, math.nan, math.nan)))


def words(axes):
    return [text.get_text() for text in axes.texts]


def test_panels_by_step_by_time_and_steps_to_the_target():
    figure = comparison_figure(
        [ADAMW, MUON, HALF, LOST], levels={"bigram": 3.9, "unigram": 8.0},
        target=("AdamW's final loss", 4.0), heading=("Head", "data, seeds"), note="unchecked: x",
    )  # fmt: skip
    steps, time, reached = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == [
        *("optimizer step", "training time (seconds)", "steps to 4.000, AdamW's final loss")
    ]
    assert words(steps) == ["bigram 3.900"] + [
        *("AdamW 4.000", "Muon 3.200", "soap (1 diverged) 3.500", "lion")
    ]
    assert "Muon 10 s" in words(time)
    # 10 and 14 steps: 12 +- 12.71 * sqrt(8) / sqrt(2); one of two runs of soap is there at 10.
    assert words(reached) == ["10 (1 of 2)", "12 ± 25", "20", "-"]
    assert [text.get_text() for text in reached.get_yticklabels()][0] == "soap (1 diverged)"
    assert not figure.legends and all(axes.get_legend() is None for axes in figure.axes)
    said = [text.get_text() for text in figure.texts]
    assert said[0].strip() == "Head" and {"data, seeds", "unchecked: x"} <= set(said)


def test_seeds_are_a_band_from_the_lowest_to_the_highest():
    (band,) = comparison_figure([MUON]).axes[0].collections
    heights = band.get_paths()[0].vertices
    at_the_end = heights[heights[:, 0] == 20][:, 1]
    assert (at_the_end.min(), at_the_end.max()) == (3.0, 3.4)


def test_times_that_mean_different_things_are_left_out():
    assert len(comparison_figure([ADAMW, MUON], timed=False).axes) == 1


def test_published_curves_are_drawn_by_step_alone():
    steps, time = comparison_figure([MUON], references=[ADAMW.curve]).axes
    assert "AdamW 4.000" in words(steps) and len(words(time)) == 1


@pytest.mark.parametrize("first", [6.0, math.nan])
def test_nothing_but_diverged_runs_is_a_picture(first):
    lost = Group("a", runs("a", (first, math.nan, math.nan)))
    figure = comparison_figure([lost], levels={"bigram": 3.0}, target=("goal", 1.0))
    figure.draw_without_rendering()
    assert words(figure.axes[0])[-1] == "a" and words(figure.axes[-1]) == ["-"]


def test_steps_of_runs_of_which_some_do_not_arrive_are_those_of_the_mean_curve():
    row = steps_row(MUON, 3.2, colour="C0")
    assert (row.centre, row.text, row.values) == (20.0, "20 (1 of 2)", [18.0])
    assert math.isnan(row.reach)


def test_training_shows_losses_rate_and_gradient():
    records = [
        {"step": 0, "loss": 6.0, "learning_rate": 0.1, "grad_norm": 1.0},
        {"step": 9, "loss": None, "learning_rate": 0.05, "grad_norm": None},
        {"step": 19, "loss": 3.9, "learning_rate": 0.0, "grad_norm": 2.0},
    ]
    loss, rate, norm = training_figure(records, ADAMW.curve, ("a", "")).axes
    np.testing.assert_array_equal(rate.lines[0].get_ydata(), [0.1, 0.05, 0.0])
    np.testing.assert_array_equal(norm.lines[0].get_ydata(), [1.0, math.nan, 2.0])
    assert words(loss) == ["validation 4.000", "training"]
