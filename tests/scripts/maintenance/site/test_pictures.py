"""The pictures of docs/concepts show what their pages say."""

import numpy as np

from scripts.maintenance.record_gradients import read_gradients
from scripts.maintenance.site.layout_picture import numbered, stack_order
from scripts.maintenance.site.pictures import DEFICIENT, RECORDED, spectrum, truncation_figures


def test_the_stack_holds_every_block_once():
    assert sorted(stack_order()) == list(range(1, 13))
    assert {m.shape for m in numbered().values()} == {(16, 16), (16, 32)}


def test_truncation_is_what_the_page_says():
    gradients = read_gradients(RECORDED)[DEFICIENT]
    assert spectrum(gradients)[2] == 5
    figures = list(truncation_figures(gradients).values())
    assert np.all(np.array(figures[:2]) < 0.001)  # truncated: share of noise, change
    assert figures[2] > 0.8 and figures[3] > 0.2  # without a cutoff
