"""Blocks of pages run in one namespace and print what the page says."""

import pytest

from scripts.maintenance.site.blocks import fenced_blocks, run_page

PAGE = """# A page

```python
x = 2
```

```python
print(x + 1, 0.123)
```
```text
3 0.1...
```

```bash
not run
```
"""


def test_blocks_are_found_with_their_lines():
    found = [(block.language, block.line) for block in fenced_blocks(PAGE)]
    assert found == [("python", 3), ("python", 7), ("text", 10), ("bash", 14)]


def test_a_page_runs_in_one_namespace(tmp_path):
    (tmp_path / "page.md").write_text(PAGE, encoding="utf-8")
    assert run_page(tmp_path / "page.md") == 2


def test_what_a_page_says_is_compared(tmp_path):
    (tmp_path / "page.md").write_text(PAGE.replace("3 0.1...", "4 0.1..."), encoding="utf-8")
    with pytest.raises(
        AssertionError, match=r"page.md:7: the page says(.|\n)*but it prints\n3 0.123"
    ):
        run_page(tmp_path / "page.md")


def test_a_failure_names_the_line_of_the_page(tmp_path):
    (tmp_path / "page.md").write_text(PAGE.replace("x = 2", "x = y"), encoding="utf-8")
    with pytest.raises(NameError) as caught:
        run_page(tmp_path / "page.md")
    assert caught.traceback[-1].lineno == 3  # counted from 0: the line below the fence
