"""Dot plots: their intervals, and that figures stay clear of dots."""

import math

import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure

from nanogpt.report.dots import Row, draw_dots, interval


def test_the_interval_is_students():
    for n in (2, 3, 4, 7, 10, 40):
        values = np.random.default_rng(n).normal(size=n)
        low, high = scipy.stats.t.interval(0.95, n - 1, np.mean(values), scipy.stats.sem(values))
        # Beyond ten runs the normal distribution is taken for it.
        assert interval(list(values)) == pytest.approx(
            (high - low) / 2, rel=0.04 if n > 10 else 2e-3
        )
    assert math.isnan(interval([1.0]))


def test_figures_stand_clear_of_dots_and_intervals():
    rows = [
        Row("one", "C0", (240.0, 250.0), 245.0, 60.0, "245 ± 60 (2 of 2)", strong=True),
        Row("a name that is far too long for this", "C1", (), math.nan, math.nan, "-"),
        Row("$x$", "C1", (300.0,), 300.0, math.nan, "300"),
    ]
    figure = Figure(figsize=(4, 2), layout="constrained")
    axes = figure.add_subplot()
    draw_dots(axes, rows, "steps", 2.6)
    figure.draw_without_rendering()
    left = min(text.get_window_extent().x0 for text in axes.texts)
    right = max(line.get_window_extent().x1 for line in axes.lines)
    assert right < left
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names[0] == "one" and len(names[1]) <= 24 and "…" in names[1]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is the highest


def test_rows_without_a_figure_are_a_picture():
    axes = Figure().add_subplot()
    draw_dots(axes, [Row("a", "C0", (), math.nan, math.nan, "-")], "loss", 3.0)
    assert np.isfinite(axes.get_xlim()).all()
