"""The table of measurements: what it says, where it goes, when it fails."""

import re
from pathlib import Path

import pytest

from scripts.maintenance import parity_table
from scripts.maintenance.parity.measurement import Measurement, misses

HOLDS = Measurement("rope", "y", 1e-7, 2e-6, 3e-7)
MISSES = Measurement("loader", "tokens", 1.0, 0.0)


def test_table_is_written_between_the_marks_and_misses_fail(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{parity_table.BEGIN}old\n{parity_table.END}after\n")
    for found, status in (([HOLDS], 0), ([HOLDS, MISSES], 1)):
        monkeypatch.setattr(parity_table, "measurements", lambda found=found: iter(found))
        assert parity_table.main(["--page", str(page)]) == status
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert "| rope | y | 1.0e-07 | 2.0e-06 | 3.0e-07 |" in lines
    assert "| loader | tokens | 1.0e+00 | 0.0e+00 |  |" in lines
    assert "MISS" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("text", ["", parity_table.BEGIN, parity_table.END + parity_table.BEGIN])
def test_a_page_without_both_marks_is_named_and_left_alone(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"page\.md: must have the lines '<!-- measured -->' and"):
        parity_table.write(page, "table\n")
    assert page.read_text() == text


def test_the_table_in_docs_has_no_misses():
    page = Path(__file__).parents[3] / "docs" / "parity.md"
    measured = page.read_text(encoding="utf-8").split(parity_table.BEGIN)[1]
    lines = re.findall(r"^\| .* \| (\d\S*) \| (\d\S*) \| \S* ?\|$", measured, re.MULTILINE)
    assert len(lines) > 50
    assert all(float(error) <= float(tolerance) for error, tolerance in lines)


def test_nothing_compared_is_no_agreement():
    with pytest.raises(ValueError, match="nothing was compared"):
        misses([])
