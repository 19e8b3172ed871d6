"""Rates of preset medium's proposals: by the rules, and as docs/medium.md tells them."""

import pathlib

import pytest

from nanogpt.config.presets import preset
from scripts.maintenance import medium_rates

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "medium.md"


def test_rules_from_widths_64_and_32_to_1024():
    assert medium_rates.transferred("lion") == {"board": 0.004 / 16, "medium_board": 0.008 / 32}
    assert medium_rates.transferred("muon_track3") == {"board": 0.04, "medium_board": 0.05}
    assert medium_rates.transferred("kl_shampoo")["board"] == 0.08 / 8  # deeper, not wider


def test_a_rate_is_corrected_by_what_is_published():
    assert medium_rates.rate("adamw") == pytest.approx(0.0015)
    # AdamW's mean is 0.0005 * 2^0.5.
    assert medium_rates.rate("lion") == pytest.approx(0.00025 * 3 / 2**0.5)


@pytest.mark.parametrize("name", ["lion", "sophia"])
def test_what_no_larger_run_is_known_of_has_the_corrected_rate(name):
    chosen = preset("medium", name).matrices.learning_rate
    assert chosen == pytest.approx(medium_rates.rate(name), rel=0.02)


def test_the_page_has_the_table():
    assert medium_rates.table() in PAGE.read_text(encoding="utf-8")
