"""What the table says and what the picture is made of."""

import math

import pytest

from nanogpt.report.board import board_figure, board_table, draw_board
from nanogpt.report.curves import Curve
from nanogpt.report.groups import Group
from nanogpt.report.plotting import GREY

STEPS = (0, 10, 20)


def group(label, *losses, **fields):
    runs = [Curve(f"{label}{i}", STEPS, loss, (0.0, 5.0, 10.0)) for i, loss in enumerate(losses)]
    return Group(label, runs, **fields)


ADAMW = group("AdamW", (6.0, 5.0, 4.0), (6.0, 5.2, 4.2))
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


def drawn(groups, **options):
    figure = board_figure(groups, **options)
    return figure, {axes.get_xlabel(): axes for axes in figure.axes}


def words(axes):
    return [text.get_text() for text in axes.texts]


def test_rows_of_losses_steps_and_times_and_curves_less_the_baselines():
    figure, panels = drawn([MUON, ADAMW], target=4.1, baseline="AdamW", heading=("Board", "data"))
    assert list(panels) == [
        "final loss, less AdamW's",
        "steps to 4.100",
        "time (s)",
        "optimizer step",
    ]
    loss, steps, time, curves = panels.values()
    assert words(loss) == ["\N{MINUS SIGN}1.100", "4.100"]  # 3.0 less 4.1
    assert words(steps) == ["10", "20 (1 of 2)"] and words(time) == ["-", "10.0"]
    assert [text.get_text() for text in loss.get_yticklabels()] == ["Muon", "AdamW"]
    assert not steps.get_yticks().size
    # Muon's curve less the mean of AdamW's (6, 5.1, 4.1), and AdamW's band around itself.
    assert curves.lines[0].get_ydata() == pytest.approx([0, -1.1, -1.1])
    (band,) = curves.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((-0.1, 0.1))
    assert "Board" in figure.get_suptitle()


def test_shampoo_is_emphasised_and_the_best_of_the_others_has_its_name():
    names = ("muon", "lion", "kl_shampoo", "shampoo")
    groups = [group(n, (6.0, 5.0, 3.0 + 0.1 * k)) for k, n in enumerate(names)]
    _, panels = drawn([*groups, ADAMW], baseline="AdamW")
    curves = panels["optimizer step"]
    colours = {text.get_text(): text.get_color() for text in curves.texts}
    assert colours == {"muon": GREY, "kl_shampoo": "C1", "shampoo": "C1", "AdamW": "C0"}
    dashes = [line.get_linestyle() for line in curves.lines if line.get_color() == "C1"]
    assert dashes[0] != dashes[2]
    labels = next(iter(panels.values())).get_yticklabels()
    weights = {text.get_text(): text.get_fontweight() for text in labels}
    assert weights["shampoo"] == "bold" and weights["muon"] == "normal"


def test_runs_of_ours_stand_out_of_published_ones():
    published = group("published", (6.0, 5.0, 4.0), reference=True, timed=False)
    _, panels = drawn([group("Lion, this project", (6.0, 5.0, 3.0), timed=False), published])
    assert list(panels) == ["final loss", "optimizer step"]
    assert panels["optimizer step"].lines[0].get_color() == "C1"


def test_one_slow_curve_does_not_squeeze_the_others():
    curves = [
        Curve(str(n), range(n + 1), [3.0] * (n + 1), [0.0] * (n + 1)) for n in (100, 100, 900)
    ]
    _, panels = drawn([Group(curve.label, [curve], timed=False) for curve in curves])
    assert panels["optimizer step"].get_xlim() == pytest.approx((20, 180))


def test_losses_at_different_steps_are_not_subtracted():
    short = Group("short", [Curve("s", (0, 10), (6.0, 5.0), (0.0, 1.0))])
    _, panels = drawn([short, ADAMW], baseline="AdamW")
    assert words(panels["final loss, less AdamW's"]) == ["5.000", "4.100"]


def test_runs_that_diverged_are_counted():
    half = group("lion", (6.0, 5.0, 4.0), (6.0, math.nan, math.nan))
    gone = group("psgd", (6.0, math.nan, math.nan))
    _, panels = drawn([half, gone, ADAMW], baseline="AdamW", target=1.0)
    assert words(panels["final loss, less AdamW's"])[:2] == ["1 of 2 diverged", "diverged"]
    assert "steps to 1.000" not in panels  # nobody is there


def test_diverged_runs_are_drawn_and_listed(tmp_path):
    diverged = group("bad", (math.nan,) * 3)
    assert draw_board([diverged], tmp_path / "a") == tmp_path / "a" / "leaderboard.png"
    assert (tmp_path / "a" / "leaderboard-dark.png").stat().st_size > 1000
    assert cells(board_table([diverged], target=4.0))[2][3:6] == ["nan", "-", "-"]


@pytest.mark.parametrize("make", [board_table, lambda groups: draw_board(groups, "unused")])
def test_runs_that_share_no_step_are_named(make):
    apart = [Curve(label, (step,), (1.0,), (0.0,)) for step, label in enumerate("ab")]
    with pytest.raises(ValueError, match="no step at which all runs were validated; runs: a, b"):
        make([Group("x", apart)])


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        draw_board([], tmp_path)
