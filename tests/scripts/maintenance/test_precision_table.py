"""Simulated arithmetics, and what they make of an update."""

import numpy as np
import pytest

from scripts.maintenance import precision_table as table

GRADIENTS = np.random.default_rng(0).normal(size=(8, 12, 16)).astype(np.float32)


def test_rounding_is_to_the_nearest_number_of_so_many_bits():
    x = np.random.default_rng(1).normal(size=100)
    for bits in (8, 11, 24):
        error = np.abs(table.rounded(x, bits) - x) / np.abs(x)
        assert 0 < error.max() <= 2.0**-bits
    np.testing.assert_array_equal(table.rounded(x, 24), x.astype(np.float32))


@pytest.mark.parametrize("side", table.EXPONENTS)
def test_more_bits_are_nearer(side):
    rows = [
        table.compare(GRADIENTS, table.ARITHMETICS[name], table.EXPONENTS[side])
        for name in ("bfloat16", "TF32", "bfloat16 x 3", "float32")
    ]
    for rough, fine in zip(rows, rows[1:], strict=False):
        assert 1 - rough.both > 1 - fine.both >= -1e-15
        assert rough.eigenvalues > fine.eigenvalues
    assert rows[0].both > 0.99


def test_the_table_has_a_row_for_each_arithmetic(monkeypatch, capsys):
    monkeypatch.setattr(table, "read_gradients", lambda path: {"5:q": GRADIENTS})
    monkeypatch.setattr("sys.argv", ["precision_table"])
    table.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == list(table.ARITHMETICS)
    assert lines[2].startswith("| 5:q 12x16 | float32 | ")
