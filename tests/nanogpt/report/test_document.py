"""One HTML file: what it tells, that it stands alone, and that nothing of a run is markup."""

import html.parser
import json
import re

import pytest
from matplotlib.figure import Figure

from nanogpt import cli
from nanogpt.report import document
from nanogpt.report.plotting import DARK, LIGHT
from tests.nanogpt.report.test_comparison import CURVES, write_run
from tests.nanogpt.report.test_spectra import record

HOSTILE = (
    "</title><script>alert(1)</script><img src=x onerror='alert(2)'> $\\frac$ @BODY@ \x00 \ud800"
)


class Reader(html.parser.HTMLParser):
    """Tags, attributes and cells of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.rows, self.open = set(), [], [], []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.rows += [[]] * (tag == "tr")
        if tag in ("td", "th"):
            self.rows[-1] = [*self.rows[-1], ""]
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def change(folder, **fields):
    """Changes the first record of a run's metrics."""
    path = folder / "metrics.jsonl"
    first, *rest = path.read_text().splitlines()
    start = json.loads(first)
    for name, value in fields.items():
        start[name] = start[name] | value if isinstance(value, dict) else value
    path.write_text("\n".join([json.dumps(start), *rest]))


@pytest.fixture
def light(monkeypatch):
    """Pictures of nothing, where these do not matter."""
    for name in ("training_figure", "eigenvalues_figure", "maps_figure"):
        monkeypatch.setattr(document, name, lambda *_: Figure(figsize=(1, 1)))


def written(tmp_path, *folders):
    out = tmp_path / "new" / "report.html"
    cli.main(["report", *map(str, folders), "--out", str(out)])
    return out.read_text(encoding="utf-8")


def test_a_comparison_holds_results_curves_settings_and_environment(tmp_path, light):
    folders = [write_run(tmp_path / name, name, CURVES[name]) for name in ("adamw", "muon")]
    change(folders[1], config={"matrices": {"rate": 0.5}}, argv=["nanogpt", "train"])
    page = Reader(written(tmp_path, *folders))
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows[""] == ["AdamW", "Muon"]
    assert rows["final loss (nats/token)"] == ["4.0000", "3.0000"]
    assert rows["matrices.rate"] == ["-", "0.5"] and rows["schedule.steps"] == ["30", "30"]
    assert rows["command"] == ["-", "nanogpt train"] and rows["version.jax"] == ["1.2.3"] * 2
    assert rows["device.kind"] == ["abacus"] * 2
    assert "Muon 3.000" in page.text and "optimizer step" in page.text  # words in the picture
    # What differs is first and marked.
    names = [row[0] for row in page.rows]
    assert names.index("matrices.rate") < names.index("schedule.steps")
    assert ("class", "differs") in page.attributes
    assert "Spectra" not in page.text


def test_a_page_stands_alone_and_follows_the_scheme(tmp_path, light):
    text = written(tmp_path, write_run(tmp_path / "a", "muon", CURVES["muon"]))
    page = Reader(text)
    assert not {"script", "link", "iframe", "object"} & page.tags
    links = [value for name, value in page.attributes if name.split(":")[-1] in ("href", "src")]
    assert all(link.startswith(("#", "data:image/")) for link in links)
    assert not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text
    # Pictures have the page's colours, of which there are two sets.
    svg = text[text.index("<svg") : text.index("</svg>")].lower()
    for paper in (LIGHT, DARK):
        assert f"--page:{paper.page}" in text and f"--curve0:{paper.curves[0]}" in text
    assert "var(--ink)" in svg and "var(--curve2)" in svg
    assert not [colour for colour in (*LIGHT[:3], *LIGHT.curves) if f": {colour.lower()}" in svg]
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_what_comes_from_a_run_is_text(tmp_path, monkeypatch):
    """A name, settings, host and data, in the page and in the words of its pictures."""
    folder = write_run(tmp_path / "a", "muon", CURVES["muon"], name=HOSTILE)
    hostile = {
        "config": {"optimizer": HOSTILE, HOSTILE: HOSTILE, "data": {"directory": HOSTILE}},
        "device": {"kind": HOSTILE},
        "versions": {HOSTILE: HOSTILE},
        "fingerprint": {"data": HOSTILE},
        "argv": [HOSTILE],
        "host": HOSTILE,
    }
    change(folder, **hostile)
    train = {"kind": "train", "step": 1, "loss": 1.0, "learning_rate": 1.0, "grad_norm": 1.0}
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps(train))
    text = written(tmp_path, folder)
    page = Reader(text)
    plain = Reader(written(tmp_path, write_run(tmp_path / "b", "muon", CURVES["muon"])))
    assert page.tags <= plain.tags | {"details", "summary", "path", "use", "defs"}
    assert not {"script", "img"} & page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert text.count("<main>") == 1 and "\x00" not in text
    rows = {row[0]: row[1:] for row in page.rows}
    assert "<script>alert(1)</script>" in rows["host"][0]
    assert any("<script>" in name for name in rows)


def test_spectra_of_a_monitored_run_are_in_it(tmp_path, light, monkeypatch):
    folder = write_run(tmp_path / "a", "shampoo", CURVES["shampoo"])
    change(folder, config={"matrices": {"cutoff": "relative"}})
    matrices = {"blocks/0/attn/q": record(8)}
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps({"kind": "spectra", "step": 4, "matrices": matrices}))
    page = Reader(written(tmp_path, folder))
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["blocks/0/attn/q inputs"][:2] == ["8 of 16", "2.5"]
    assert "Spectra, Shampoo" in page.text and "Eigenvalues of factors" in page.text


def test_nothing_to_report_and_what_cannot_be_compared_are_said(tmp_path):
    with pytest.raises(ValueError, match="name at least one folder"):
        document.write_report([], tmp_path / "x.html")
    old = write_run(tmp_path / "old", "muon", CURVES["muon"])
    change(old, fingerprint=None)
    with pytest.raises(SystemExit, match="error: .*old: no fingerprint"):
        cli.main(["report", str(old), "--out", str(tmp_path / "x.html")])
