"""Published curves are read as they are, and means are taken over what runs share."""

import math

import pytest

from nanogpt.report.curves import (
    Curve,
    mean_curve,
    read_curves,
    read_reference,
    step_time,
    steps_to_reach,
)

STEPS = (0, 10, 20, 30)
RAW = """# result: x
run,step,val_loss,train_time_s,val_ema_loss
0,0,10.0,0.0,9.0
0,125,5.0,30.0,8.0
0,250,4.0,60.0,7.0
1,0,11.0,0.0,6.0
1,125,6.0,,5.0
"""
MEAN = """# result: x
# n: 2
step,val_loss,train_time_s,val_loss_std,n
0,10.5,0.0,0.1,2
125,5.5,31.0,0.1,2
"""


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "t3_x.csv"
    path.write_text(RAW)
    return path


def test_every_run_is_a_curve(raw):
    first, second = read_curves(raw)
    assert first == ("t3_x 0", (0, 125, 250), (10.0, 5.0, 4.0), (0.0, 30.0, 60.0))
    assert second[:3] == ("t3_x 1", (0, 125), (11.0, 6.0))
    assert second.seconds[0] == 0.0 and math.isnan(second.seconds[1])


def test_another_column_of_losses(raw):
    assert [curve.losses for curve in read_curves(raw, "val_ema_loss")] == [(9, 8, 7), (6, 5)]


def test_reference_is_the_mean_over_steps_that_all_runs_have(raw, tmp_path):
    assert read_reference(raw)[:3] == ("t3_x", (0, 125), (10.5, 5.5))
    (tmp_path / "t3_y.mean.csv").write_text(MEAN)
    curve = read_reference(tmp_path / "t3_y.mean.csv")
    assert curve == ("t3_y", (0, 125), (10.5, 5.5), (0.0, 31.0))


def test_means_are_no_runs(tmp_path):
    (tmp_path / "x.mean.csv").write_text(MEAN)
    with pytest.raises(ValueError, match=r"x\.mean\.csv has no column 'run': it holds a mean"):
        read_curves(tmp_path / "x.mean.csv")


@pytest.mark.parametrize("read", [read_curves, read_reference])
@pytest.mark.parametrize("text", ["step,loss\n0,1\n", ""])
def test_curve_without_a_column_is_named(tmp_path, text, read):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=r"x\.csv has no column '(val_loss|step)'"):
        read(tmp_path / "x.csv")


@pytest.mark.parametrize("row", ["0,0,none,1,1", "0,0.5,3.0,1,1", "0"])
def test_row_that_is_no_validation_is_shown(tmp_path, row):
    (tmp_path / "x.csv").write_text(f"run,step,val_loss,train_time_s,val_ema_loss\n{row}\n")
    with pytest.raises(ValueError, match=r"x\.csv holds a row that is no validation: .*'run': '0'"):
        read_curves(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("losses", "target", "expected"),
    [
        ((6.0, 5.0, 4.5, 4.0), 4.5, 20.0),
        ((6.0, 5.0, 4.5, 4.0), 4.6, 18.0),
        ((6.0, 5.0, 4.5, 4.0), 3.9, None),
        ((6.0, 5.0, 4.5, 4.0), 7.0, 0.0),
        ((6.0, 4.0, 5.0, 4.0), 4.5, 7.5),  # the first time counts
        ((6.0, math.nan, math.nan, math.nan), 4.5, None),  # diverged
        ((6.0, math.nan, 4.0, 3.0), 4.5, 20.0),
    ],
)
def test_steps_to_reach(losses, target, expected):
    assert steps_to_reach(Curve("a", STEPS, losses, STEPS), target) == pytest.approx(expected)


def test_step_time_is_the_median_over_intervals():
    slow = Curve("slow", STEPS, STEPS, (0.0, 10.0, 20.0, 90.0))
    assert step_time(slow) == 1.0
    assert step_time(Curve("fast", STEPS, STEPS, (0.0, 5.0, 20.0, 25.0))) == 0.5
    assert math.isnan(step_time(Curve("untimed", STEPS, STEPS, [math.nan] * 4)))


def test_mean_of_runs_that_share_nothing_is_empty():
    runs = [Curve("a", (0,), (1.0,), (0.0,)), Curve("b", (1,), (1.0,), (0.0,))]
    assert mean_curve(runs, "ab") == ("ab", (), (), ())


def test_rows_in_any_order_and_a_byte_order_mark(raw):
    head, *rows = RAW.splitlines()[1:]
    raw.write_text("\ufeff" + "\n".join([head, *sorted(rows, reverse=True)]), encoding="utf-8")
    assert sorted(curve[:3] for curve in read_curves(raw)) == [
        ("t3_x 0", (0, 125, 250), (10.0, 5.0, 4.0)),
        ("t3_x 1", (0, 125), (11.0, 6.0)),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RAW.replace("\n1,", "\n0,").encode(), r"t3_x\.csv has step 0 of run '0' twice"),
        (b"\xff\xfe\x00", r"t3_x\.csv is no text"),
    ],
)
def test_what_would_be_misread_is_refused(raw, text, message):
    raw.write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_curves(raw)
