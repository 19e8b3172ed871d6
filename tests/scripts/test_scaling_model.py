"""The model of scale counts blocks, divides evenly where it can, and sees filling."""

import pytest

from scripts.scaling_model import Rates, predict, shapes

RATES = Rates(1e12, 1e11, 1e10)


def test_work_is_divided_and_filling_counted():
    params = shapes(8, 16, 64, 16)  # 8 of each matrix
    one, eight, many = (predict(params, n, RATES) for n in (1, 8, 64))
    assert one["communication"] == 0 and one["filling"] == eight["filling"] == 0
    assert eight["roots"] == pytest.approx(one["roots"] / 8)
    # A stack of 32 and one of 24, on 64 owners.
    assert many["filling"] > 0.4 and many["state"] < eight["state"]
    # Updates of all parameters reach every device, 7/8 of them from others.
    size = 8 * (4 * 16 * 16 + 3 * 16 * 64) * 4
    assert eight["communication"] == pytest.approx(size * 7 / 8 / (1e11 * 0.4))
