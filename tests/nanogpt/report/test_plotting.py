"""What pictures are made of."""

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from nanogpt.report.curves import Curve
from nanogpt.report.plotting import DARK, LIGHT, Label, label_ends, limits, save, spread

FAST = Curve("fast", range(0, 101, 10), np.linspace(7.0, 3.0, 11), range(11))
SLOW = Curve("slow", range(0, 101, 10), np.linspace(7.0, 4.0, 11), range(11))


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.floats(0.01, 3))
def test_spread_labels_neither_overlap_nor_change_order(positions, gap):
    moved = spread(positions, gap)
    order = np.argsort(positions, kind="stable")
    assert np.all(np.diff(np.array(moved)[order]) >= gap * (1 - 1e-6))
    assert np.mean(moved) == pytest.approx(np.mean(positions), abs=1e-6)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9))
def test_spread_labels_stay_within_the_panel(positions):
    moved = np.array(spread(positions, 0.5, -2.0, 3.0))
    order = np.argsort(positions, kind="stable")
    assert -2 <= moved.min() and moved.max() <= 3
    assert np.all(np.diff(moved[order]) >= 0.5 * (1 - 1e-3))


def test_labels_that_have_room_stay():
    assert spread([5.0, 1.0, 3.0], gap=1.0) == [5.0, 1.0, 3.0]


def test_limits_leave_out_the_first_fall_and_show_every_end():
    low, high = limits([FAST, SLOW])
    assert 2.7 < low < 3.0
    assert 6.7 <= high < 7.0  # the slow run after a tenth of its steps is at 6.7


def test_limits_show_baselines_that_cost_the_curves_no_room():
    """A unigram's loss, which runs pass at once, would squeeze what comes after it."""
    low, high = limits([FAST, SLOW], [8.0, 2.5])
    assert 2.0 < low < 2.5
    assert 6.7 <= high < 7.0


def test_limits_are_those_of_runs_that_did_not_diverge():
    lost = Curve("lost", [0, 50, 100], [7.0, 50.0, 90.0], [0, 1, 2])
    assert limits([FAST, lost]) == limits([FAST])


def test_limits_of_a_constant_are_not_empty():
    low, high = limits([Curve("flat", [0, 1], [2.0, 2.0], [0, 1])])
    assert low < 2.0 < high


@pytest.mark.parametrize("levels", [[], [3.0]])
@pytest.mark.parametrize("first", [7.0, np.nan])
def test_limits_of_diverged_runs_are_numbers(first, levels):
    runs = [Curve(name, [0, 10, 20], [first, np.nan, np.nan], [0, 1, 2]) for name in ("a", "b")]
    low, high = limits(runs, levels)
    assert np.isfinite([low, high]).all() and low < high


def luminance(colour):
    """Relative luminance as WCAG 2 defines it."""
    parts = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("paper", [LIGHT, DARK])
def test_curves_stand_out_of_the_page_and_of_one_another(paper):
    """By a contrast of 3, WCAG's for drawings; also for those who see no red or no green."""
    page = luminance(paper.page)
    for colour in (paper.ink, *paper.curves):
        high, low = sorted([page, luminance(colour)], reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 2.99, colour
    # Vienot, Brettel, Mollon 1999: what a dichromat sees of linear red, green, blue.
    protan = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
    deutan = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    rgb = np.array([matplotlib.colors.to_rgb(colour) for colour in paper.curves]) ** 2.2
    for seen in (rgb, rgb @ protan.T, rgb @ deutan.T):
        display = np.clip(seen, 0, 1) ** (1 / 2.2)
        apart = np.linalg.norm(display[:, None] - display, axis=-1)
        assert apart[np.triu_indices(len(rgb), 1)].min() > 0.13


def test_a_picture_is_written_for_light_and_for_dark_pages(tmp_path):
    def make():
        figure = Figure(figsize=(1, 1))
        figure.add_subplot().plot([0, 1], color="C0")
        return figure

    path = save(tmp_path / "new" / "a.png", make)
    assert sorted(file.name for file in path.parent.iterdir()) == ["a-dark.png", "a.png"]
    for name, paper in (("a.png", LIGHT), ("a-dark.png", DARK)):
        pixels = matplotlib.image.imread(path.with_name(name))[..., :3]
        for colour in (paper.page, paper.curves[0]):
            wanted = matplotlib.colors.to_rgb(colour)
            assert np.any(np.all(np.abs(pixels - wanted) < 0.01, axis=-1)), (name, colour)


def test_labels_neither_overlap_nor_leave_the_picture():
    """Where nine curves end together, and one far above; names may hold what TeX would read."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    ends = [*np.linspace(0, 0.05, 8), 9.0]
    label_ends(
        axes, [Label(f"$curve_{k} ends$ 3.{k}", 1, y, "C0") for k, y in enumerate(ends)], 2.3
    )
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to curves
    assert len(boxes) == 9
    for k, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert axes.bbox.y0 - 4 <= box.y0 and box.y1 <= axes.bbox.y1 + 4
        assert not any(box.overlaps(other.padded(-1)) for other in boxes[k + 1 :])
