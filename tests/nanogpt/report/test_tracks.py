"""Which results share a track."""

import dataclasses

import pytest

from nanogpt.config.presets import preset
from nanogpt.report.tracks import common_track, departure

FULL = dataclasses.asdict(preset("track3", "shampoo"))
SMALL = dataclasses.asdict(preset("cpu", "shampoo"))
MUON, MEDIUM = "t3_36_muon_tuned_3250", "t2_r03_weightdecay"


@pytest.mark.parametrize(
    ("published", "configs", "track"),
    [
        ([MUON], {}, "t3"),
        ([MEDIUM], {}, "t2"),
        ([MUON, "mine"], {"a": FULL}, "t3"),
        ([], {"a": FULL}, "t3"),
        ([], {"a": FULL, "b": SMALL}, None),
        (["mine"], {"a": SMALL}, None),
    ],
)
def test_the_common_track(published, configs, track):
    assert common_track(published, configs) == track


def test_a_run_of_track_3_is_not_of_the_medium_one():
    with pytest.raises(ValueError, match="a cannot be compared with t2_r03.*: it is of track 3"):
        common_track([MEDIUM], {"a": FULL})


def test_every_recipe_keeps_the_rules():
    for optimizer in ("adamw", "soap_h", "psgd"):
        assert departure(dataclasses.asdict(preset("track3", optimizer))) is None
    assert departure(FULL | {"data": FULL["data"] | {"val_tokens": 8}}) == (
        "data.val_tokens=8, the benchmark 10485760"
    )
