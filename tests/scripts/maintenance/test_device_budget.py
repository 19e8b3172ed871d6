"""How the report's minutes are shared: nothing saved is lost, nothing is begun in vain."""

import pathlib

import pytest

from scripts.maintenance.device.budget import LEAST_S, PARTS, RESERVE_S, Part, allot, select
from scripts.maintenance.device.prediction import table_under


def test_parts_that_take_what_they_get_fill_the_time_and_no_more():
    left = 540.0
    for i in range(len(PARTS)):
        left -= allot(PARTS[i:], left)
    assert left == pytest.approx(RESERVE_S)


def test_time_that_a_part_leaves_over_goes_to_all_others_in_proportion():
    a, b, c = (Part(name, weight, name) for name, weight in (("a", 1), ("b", 1), ("c", 2)))
    assert allot((a, b, c), 400 + RESERVE_S) == 100
    # a took nothing, so b may have a quarter of its share more.
    assert allot((b, c), 400 + RESERVE_S) == pytest.approx(400 / 3)


def test_with_little_time_the_first_parts_are_taken_and_the_last_are_skipped():
    left, begun = 45.0, []
    for i, part in enumerate(PARTS):
        seconds = allot(PARTS[i:], left)
        left -= seconds
        begun += [part.name] if seconds else []
    assert begun[:2] == ["probe", "numerics"] and "precision" not in begun and left >= RESERVE_S


@pytest.mark.parametrize(
    ("left", "begun"), [(LEAST_S + RESERVE_S, True), (12.0, False), (-3, False)]
)
def test_a_part_is_not_begun_with_too_little(left, begun):
    assert bool(allot((Part("a", 1, "A"),), left)) is begun


def test_parts_keep_the_reports_order_and_unknown_ones_are_named():
    assert [p.name for p in select(("precision", "probe"))] == ["probe", "precision"]
    assert select(()) == PARTS
    with pytest.raises(ValueError, match=r"parts=\['steps'\]: choose from probe, numerics, step"):
        select(("probe", "steps"))


def test_the_documented_shares_are_those_of_nine_minutes():
    text = (pathlib.Path(__file__).parents[3] / "docs" / "devices" / "README.md").read_text()
    rows = {row["part"]: row["s of 540"] for row in table_under(text, "How the time is shared")}
    whole = sum(part.weight for part in PARTS)
    shares = {part.name: f"{part.weight / whole * (540 - RESERVE_S):.0f}" for part in PARTS}
    assert rows == shares
