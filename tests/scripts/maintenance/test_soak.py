"""A soak keeps what is done, goes on with it, and judges losses by those of undisturbed runs."""

import random

import pytest

from scripts.maintenance import soak


@pytest.fixture
def done(tmp_path):
    one = soak.Soak(tmp_path, 100, random.Random(0), None, minutes=12.5)
    one.happened["kill"] += 3
    one.told.append("muon-1: stop on 2: ended 1")
    one.alone |= {"adamw": [4.0, 4.5, 4.25], "muon": [3.0]}
    one.losses |= {"adamw-0": ("adamw", 4.9), "adamw-1": ("adamw", 3.4), "muon-2": ("muon", 3.0)}
    one.keep(tmp_path)
    return one


def test_what_is_done_is_kept_and_gone_on_with(tmp_path, done):
    other = soak.Soak(tmp_path, 100, random.Random(0), None)
    other.go_on(tmp_path)
    assert (other.minutes, other.happened, other.told) == (12.5, done.happened, done.told)
    assert other.alone == done.alone and soak.page(other) == soak.page(done)
    other.happened["stop"] += 1  # still a counter
    with pytest.raises(ValueError, match="--go-on: that soak has --steps 100"):
        soak.Soak(tmp_path, 99, random.Random(0), None).go_on(tmp_path)


def test_losses_are_judged_by_the_range_of_undisturbed_ones(tmp_path, done):
    text = (tmp_path / "soak.md").read_text()
    assert "| adamw-0 | 4.90000 | 4.00000, 4.50000, 4.25000 | yes |" in text
    assert "| adamw-1 | 3.40000 | 4.00000, 4.50000, 4.25000 | NO |" in text
    assert "| muon-2 | 3.00000 | 3.00000 | not known yet |" in text
    assert "| kill | 3 |" in text and "- muon-1: stop on 2" in text
