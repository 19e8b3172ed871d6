"""docs/parity.md lists every row of the traps, each with exactly the tests marked by its name."""

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
ROWS = [f"{letter}{i}" for letter, n in (("A", 21), ("M", 3), ("S", 7)) for i in range(1, n + 1)]
ROWS.append("R1")


def marked_tests():
    """{row: names of the test functions with `@pytest.mark.trap(row)`}, and all names of tests."""
    rows, names = {}, Counter()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            names[node.name] += 1
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.trap":
                    for argument in call.args:
                        rows.setdefault(ast.literal_eval(argument), set()).add(node.name)
    return rows, names


def listed_tests():
    """{row: names of tests in the last cell of its line}, of the page's table."""
    lines = re.findall(r"^\| ([A-Z]\d+) \|.*\| ([^|]+) \|$", PAGE, re.MULTILINE)
    assert len(lines) == len(dict(lines)), "a row is listed twice"
    return {row: set(re.findall(r"`(test_\w+)`", cell)) for row, cell in lines}


def test_every_row_is_listed():
    assert list(listed_tests()) == ROWS


def test_every_row_has_a_test_that_names_it():
    assert sorted(marked_tests()[0]) == sorted(ROWS)


def test_each_row_lists_the_tests_that_are_marked():
    rows, names = marked_tests()
    listed = listed_tests()
    assert {row: listed[row] ^ tests for row, tests in rows.items() if listed[row] != tests} == {}
    ambiguous = {name for tests in rows.values() for name in tests if names[name] > 1}
    assert not ambiguous, "the page names tests by function: choose other names"
