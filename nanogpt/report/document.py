"""One HTML file about one run or several: figures, curves, spectra, settings, environment.

It holds all that it shows, runs no scripts, and follows the page's light or dark scheme. Whatever
comes from a run is text, never markup.
"""

import html
import io
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from nanogpt.report import comparison
from nanogpt.report.comparable import PARTS, check_comparable
from nanogpt.report.figures import training_figure
from nanogpt.report.groups import pooled
from nanogpt.report.plotting import DARK, LIGHT
from nanogpt.report.runs import Run, subject
from nanogpt.report.spectra import eigenvalues_figure, last_figures, maps_figure, read_spectra
from nanogpt.report.tables import PAGES, printable, shorten
from nanogpt.train.metrics import read_records
from nanogpt.train.paths import Path, path_of, replace_text
from nanogpt.train.stored import expecting_form

NAMES = ("ink", "page", "grid", *(f"curve{k}" for k in range(len(LIGHT.curves))))


class Markup(str):
    """Text that is markup already; any other is escaped."""


def element(name: str, *parts: str, **attributes: str) -> Markup:
    """Returns an element of HTML.

    >>> element("td", "<b>", element("i", "a & b"), class_="x")
    '<td class="x">&lt;b&gt;<i>a &amp; b</i></td>'
    """
    inner = "".join(p if isinstance(p, Markup) else html.escape(printable(p)) for p in parts)
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(printable(value))}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{said}>{inner}</{name}>")


def write_report(
    folders: Sequence[Path | str],
    out: pathlib.Path,
    *,
    unchecked: bool = False,
    target: float | None = None,
) -> pathlib.Path:
    """Writes the file.

    Args:
        folders: of runs, at least one.
        out: the file; its folder is made if it is not there.
        unchecked: as of `nanogpt.report.comparison.compare`, as are `target` and the errors.
        target: loss to reach.
    """
    if not folders:
        raise ValueError("no runs to report: name at least one folder of a run.")
    runs = comparison.read_runs(folders)
    check_comparable({run.folder: run.start for run in runs}, unchecked=unchecked)
    named = comparison.named(runs)
    groups = pooled(runs)
    head = ", ".join(group.label for group in groups)
    if len(runs) == 1:
        head = f"{head}: {runs[0].start['config']['name']}"
    title = shorten(head, 60) if len(groups) == 1 or len(head) <= 60 else f"{len(groups)} settings"
    style = (PAGES / "report.css").read_text(encoding="utf-8")
    body = element(
        "main",
        element("h1", title),
        element("p", subject([run.start for run in runs]).replace("\n", ", "), class_="about"),
        *_results(named, target),
        element("h2", "Loss"),
        picture(partial(comparison.figure_of, runs, target=target), "Validation losses"),
        *_trainings(named),
        *_spectra(named),
        *_tables(named),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    words = {"TITLE": html.escape(title), "COLOURS": _colours(), "STYLE": style, "BODY": body}
    frame = (PAGES / "report.html").read_text(encoding="utf-8")
    replace_text(out, re.sub("@([A-Z]+)@", lambda found: words[found[1]], frame))
    return out


def picture(make: Callable[[], Figure], caption: str, *, wide: bool = False) -> Markup:
    """Returns a figure as SVG whose colours are the page's.

    Args:
        make: makes it, in the colours of matplotlib's settings.
        caption: what it shows; no two pictures of a file have the same.
        wide: keep its size and scroll, where the window is narrower.
    """
    written = io.StringIO()
    # Words stay words; what has a number of its own in the file gets it from the caption.
    settings = {"svg.fonttype": "none", "svg.hashsalt": printable(caption)}
    with matplotlib.rc_context(LIGHT.style | settings):
        make().savefig(written, format="svg", metadata={"Date": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg[^>]* (viewBox="[^"]*")[^>]*>', r'<svg role="img" \1>', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # of groups, the same in every picture
    for name, colour in zip(NAMES, (*LIGHT[:3], *LIGHT.curves), strict=True):
        svg = svg.replace(f": {colour.lower()}", f": var(--{name})")
    kind = "wide" if wide else "narrow"
    return element("figure", Markup(svg), element("figcaption", caption), class_=kind)


def _colours() -> str:
    """The page's colours, and those of dark pages."""

    def rule(paper: Any) -> str:
        pairs = zip(NAMES, (*paper[:3], *paper.curves), strict=True)
        return ":root{" + "".join(f"--{name}:{colour};" for name, colour in pairs) + "}"

    return f"{rule(LIGHT)}@media (prefers-color-scheme: dark){{{rule(DARK)}}}"


def grid(
    rows: Mapping[str, Sequence[str]], heads: Sequence[str], *, marked: bool = False
) -> Markup:
    """Returns a table: a column a run; rows in which runs differ may be marked."""
    lines = [element("tr", *(element("th", head) for head in ("", *heads)))]
    for name, cells in rows.items():
        kind = {"class_": "differs"} if marked and len(set(cells)) > 1 else {}
        told = [element("th", name), *(element("td", cell) for cell in cells)]
        lines.append(element("tr", *told, **kind))
    return element("div", element("table", *lines), class_="table")


def _heads(runs: Sequence[Run]) -> list[str]:
    return [shorten(run.curve.label, 32) for run in runs]


def _results(runs: Sequence[Run], target: float | None) -> list[Markup]:
    columns = comparison.columns(runs, target)
    first = next(iter(columns))
    rows = {k: [cell(run) for run in runs] for k, cell in columns.items() if k != first}
    notes = [element("p", note) for note in comparison.notes(runs)]
    rows = {k: cells for k, cells in rows.items() if set(cells) != {"-"}}
    return [element("h2", "Results"), grid(rows, _heads(runs)), *notes]


def _trainings(runs: Sequence[Run]) -> list[Markup]:
    parts = []
    for run in runs:
        path = path_of(run.folder) / "metrics.jsonl"
        with expecting_form(path, ValueError):
            records = [record for record in read_records(path) if record.get("kind") == "train"]
            if records:
                heading = (shorten(run.curve.label, 60), "")
                caption = f"Training of {run.curve.label}"
                parts.append(
                    picture(partial(training_figure, records, run.curve, heading), caption)
                )
    return parts


def _spectra(runs: Sequence[Run]) -> list[Markup]:
    parts = []
    for run in runs:
        folder = path_of(run.folder)
        records = read_records(folder / "metrics.jsonl")
        if not any(record.get("kind") == "spectra" for record in records):
            continue
        spectra, label = read_spectra(folder), run.curve.label
        with expecting_form(folder / "metrics.jsonl", ValueError):
            heads, rows = last_figures(spectra)
            eigenvalues = picture(
                partial(eigenvalues_figure, spectra, spectra.choose(())),
                f"Eigenvalues of factors, {label}: red is the cutoff",
                wide=True,
            )
            maps = picture(partial(maps_figure, spectra), f"All factors, {label}", wide=True)
            cells = {" ".join(row[:2]): row[2:] for row in rows}
            last = element("details", element("summary", "Last figures"), grid(cells, heads[2:]))
            parts += [element("h2", f"Spectra, {label}"), eigenvalues, maps, last]
    return parts


def _tables(runs: Sequence[Run]) -> list[Markup]:
    heads = _heads(runs)
    settings = [flat(run.start["config"]) for run in runs]
    names = dict.fromkeys(name for of in settings for name in of)
    rows = {name: [of.get(name, "-") for of in settings] for name in names}
    # What runs differ in comes first.
    ordered = dict(sorted(rows.items(), key=lambda row: len(set(row[1])) == 1))
    places = [_environment(run) for run in runs]
    told = dict.fromkeys(name for place in places for name in place)
    where = {name: [place.get(name, "-") for place in places] for name in told}
    return [
        *(element("h2", "Settings"), grid(ordered, heads, marked=True)),
        *(element("h2", "Environment"), grid(where, heads, marked=True)),
    ]


def flat(settings: Mapping[str, Any], within: str = "") -> dict[str, str]:
    """Returns settings by dotted name.

    >>> flat({"seed": 1, "model": {"layers": 2}, "sinks": ["wandb"], "tail": None})
    {'seed': '1', 'model.layers': '2', 'sinks': '["wandb"]', 'tail': '-'}
    """
    found = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{within}{name}.")
        else:
            found[f"{within}{name}"] = told(value)
    return found


def told(value: Any) -> str:
    """A value of JSON as a word."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return value if isinstance(value, str) else json.dumps(value)


def _environment(run: Run) -> dict[str, str]:
    start = run.start
    known = {
        "folder": run.folder,
        **{name: start.get(name) for name in ("started", "host")},
        "command": " ".join(map(str, start.get("argv") or ())) or None,
        "commit": start.get("git_commit"),
        "local changes": start.get("git_dirty"),
        "parameters": start.get("parameters"),
        "state of the optimizer (bytes)": start.get("optimizer_state_bytes"),
        **{part: (start.get("fingerprint") or {}).get(part) for part in ("shards", *PARTS)},
    }
    own = flat({"device": start.get("device") or {}, "version": start.get("versions") or {}})
    return {name: told(value) for name, value in known.items()} | own
