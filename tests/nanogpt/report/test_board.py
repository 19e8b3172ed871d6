"""What the table says and what the picture is made of."""

import math

import matplotlib.image
import pytest
from matplotlib.axes import Axes

from nanogpt.report.board import board_table, draw_board
from nanogpt.report.curves import Curve
from nanogpt.report.groups import Group
from nanogpt.report.plotting import COLOURS

STEPS = (0, 10, 20)


def group(label, *losses, **fields):
    runs = [Curve(f"{label}{i}", STEPS, loss, (0.0, 5.0, 10.0)) for i, loss in enumerate(losses)]
    return Group(label, runs, **fields)


ADAMW = group("AdamW", (6.0, 5.0, 4.0), (6.0, 5.2, 4.2), family="adam")
MUON = group("Muon", (6.0, 4.0, 3.0), flops_per_step=2e12, step_time_s=0.25, timed=False)


def cells(table):
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


def test_table():
    head, _, *rows = cells(
        board_table([ADAMW, MUON], target=4.1, extra={"lr": lambda group: group.label[0]})
    )
    assert head == [
        *("optimizer", "n", "steps", "final loss", "std", "steps to 4.1", "step time (ms)"),
        *("TFLOP per step", "lr"),
    ]
    assert rows == [
        ["AdamW", "2", "20", "4.1000", "0.1414", "20", "500", "-", "A"],
        ["Muon", "1", "20", "3.0000", "-", "10", "250", "2", "M"],  # 9.5 steps
    ]


def test_columns_without_a_use_are_left_out():
    head = cells(board_table([ADAMW]))[0]
    assert head == ["optimizer", "n", "steps", "final loss", "std", "step time (ms)"]


def test_table_reads_the_last_step_that_all_runs_have():
    stopped = Curve("stopped", (0, 10), (6.0, 5.4), (0.0, 5.0))
    row = cells(board_table([Group("x", [*ADAMW.runs, stopped])]))[2]
    assert row[1:4] == ["3", "10", "5.2000"]


@pytest.fixture
def drawn(monkeypatch):
    """Lines that are drawn: (axes, label, x, y, colour, dashes)."""
    lines, plot = [], Axes.plot

    def record(axes, x, y, *rest, **style):
        if "label" in style:
            lines.append((axes, style["label"], list(x), style["color"], style["linestyle"]))
        return plot(axes, x, y, *rest, **style)

    monkeypatch.setattr(Axes, "plot", record)
    return lines


def test_panels_show_what_is_known(tmp_path, drawn):
    picture = draw_board([ADAMW, MUON], tmp_path / "a", target=4.1, title="Board")
    assert picture == tmp_path / "a" / "leaderboard.png"
    height, width, _ = matplotlib.image.imread(picture).shape
    assert width > 1000 and height > 700
    labels = {}
    for axes, label, x, *_ in drawn:
        labels.setdefault(axes.get_xlabel(), []).append((label, x[-1]))
    assert labels == {
        "optimizer step": [("AdamW", 20), ("Muon", 20)],
        "training time (seconds)": [("AdamW", 10.0)],
        "operations (FLOP)": [("Muon", 4e13)],
        "optimizer step, the end enlarged": [("AdamW", 20), ("Muon", 20)],
    }


def test_panels_without_curves_are_left_out(tmp_path, drawn):
    draw_board([ADAMW], tmp_path)
    assert len(drawn) == 3


def test_one_slow_curve_does_not_squeeze_the_final_stretch(tmp_path, drawn):
    curves = [
        Curve(str(end), range(0, end + 1), [3.0] * (end + 1), [0.0] * (end + 1))
        for end in (100, 100, 900)
    ]
    draw_board([Group(curve.label, [curve], timed=False) for curve in curves], tmp_path)
    left, right = drawn[-1][0].get_xlim()
    assert (left, right) == pytest.approx((90, 130))


def test_references_are_drawn_thinner(tmp_path, monkeypatch):
    widths, plot = {}, Axes.plot

    def record(axes, *place, **style):
        widths.setdefault(style.get("label"), style.get("linewidth"))
        return plot(axes, *place, **style)

    monkeypatch.setattr(Axes, "plot", record)
    draw_board([ADAMW, group("published", (6.0, 5.0, 4.0), reference=True)], tmp_path)
    assert widths["published"] < widths["AdamW"]


def test_families_share_a_colour_and_differ_in_dashes(tmp_path, drawn):
    names = ["a1", "b", "a2", *"cdefgh"]
    draw_board([group(n, (6.0, 5.0, 4.0), family=n[0], timed=False) for n in names], tmp_path)
    styles = {label: (colour, dashes) for _, label, _, colour, dashes in drawn}
    assert styles["a1"][0] == styles["a2"][0] == COLOURS[0] != styles["b"][0]
    assert styles["h"][0] == COLOURS[0]  # the eighth family: the colours begin again
    assert len(set(styles.values())) == len(names) - 1 and styles["h"] == styles["a2"]


def test_diverged_runs_are_drawn_and_listed(tmp_path):
    diverged = group("bad", (math.nan,) * 3)
    assert draw_board([diverged], tmp_path).stat().st_size > 1000
    assert cells(board_table([diverged], target=4.0))[2][3:6] == ["nan", "-", "-"]


@pytest.mark.parametrize("make", [board_table, lambda groups: draw_board(groups, "unused")])
def test_runs_that_share_no_step_are_named(make):
    apart = [Curve(label, (step,), (1.0,), (0.0,)) for step, label in enumerate("ab")]
    with pytest.raises(ValueError, match="no step at which all runs were validated; runs: a, b"):
        make([Group("x", apart)])


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        draw_board([], tmp_path)
