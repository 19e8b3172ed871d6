"""Page and picture of `scripts.maintenance.ablations`."""

import collections
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from nanogpt.config.presets import preset
from nanogpt.lab.trials import read_trials
from nanogpt.report.paired import Difference, paired, visible
from nanogpt.report.plotting import COLOURS, STYLE
from nanogpt.report.verdicts import LOSS_PER_STEP
from nanogpt.train.metrics import read_records
from scripts.maintenance.ablation_complete import COMPLETE, MEAN, PLAIN
from scripts.maintenance.ablation_points import (
    ABLATING,
    AGAIN,
    FAMILIES,
    JUDGING,
    NOTHING,
    TIME,
    TUNING,
    Point,
    Run,
    loss,
    make_config,
)
from scripts.maintenance.ablation_tables import (
    BOARDS,
    RECIPE,
    TEXTS,
    Found,
    ablations_table,
    better_muon,
    by_point,
    families_table,
    judged_cells,
    judged_table,
    of_families,
    rates_table,
    targets_table,
    time_table,
    told,
)
from scripts.maintenance.ablation_texts import MADE_OF

TEXT = pathlib.Path(__file__).with_name("ablation_page.md")
PAIRS = {
    "bounds": ("kl_soap(max_scale=relative)" + PLAIN, "kl_soap()" + PLAIN),
    "bounds of a mean": ("kl_soap(max_scale=relative)" + MEAN, "kl_soap()" + MEAN),
    "look ahead": ("shampoo()", "shampoo()" + PLAIN),
    "b3": ("shampoo(b3=.81)", "shampoo()"),
    "b1 and b3": ("shampoo(b1=.95, b3=.9025)", "shampoo()"),
    "soap ahead": ("soap()", "soap()" + PLAIN),
    "kl ahead": ("kl_shampoo()", "kl_shampoo()" + PLAIN),
    "kl_soap ahead": ("kl_soap()", "kl_soap()" + PLAIN),
    "soap each fifth": ("soap(every=5)", "soap()"),
    "soap each": ("soap(every=1)", "soap()"),
    "others 1": ("shampoo(others_rate=1)" + PLAIN, "shampoo()" + PLAIN),
    "others 2": ("shampoo(others_rate=2)", "shampoo()"),
    "others 8": ("shampoo(others_rate=8)", "shampoo()"),
    "others 16": ("shampoo(others_rate=16)" + PLAIN, "shampoo()" + PLAIN),
    "b1 of shampoo()": ("shampoo(b1=.95)", "shampoo()"),
    "1/4 of shampoo()": ("shampoo(exponents=1/4)", "shampoo()"),
    "1/2 of shampoo()": ("shampoo(exponents=1/2)", "shampoo()"),
    "place of eps": ("soap eps 0_3 after", "soap eps 0_3 before"),
}
MUON_STEPS = 3250  # of #36 on track 3
EMPTY = "Nothing has been trained yet."


def write(folder: pathlib.Path, runs: pathlib.Path, points: Mapping[str, Point]) -> None:
    """Writes recipe.md and recipe/ablations.png of the runs that are there."""
    records = read_trials(runs)
    trained = {Run(**r["settings"]): loss(r) for r in records}
    found = by_point(trained, ABLATING)
    same = [p for p in points.values() if p.factor == NOTHING and p.name in found]
    # One that is tuned to its family's own rates has no runs of its own: equal ones are kept once.
    unchanged = {p.family: found[p.family] for p in points.values() if p.family in found}
    unchanged |= {point.family: found[point.name] for point in same}
    differences = {
        name: paired(losses, unchanged[points[name].family])
        for name, losses in found.items()
        if name in points
        and name != points[name].family
        and points[name].family in unchanged
        and points[name].factor not in (NOTHING, TIME)
    }
    again = {p.name: paired(found[p.name], found[p.family]) for p in same if p.family in found}
    text = TEXT.read_text(encoding="utf-8").format(
        spent=_spent(records, points),
        machine=" and ".join(dict.fromkeys(r["start"]["device"]["kind"] for r in records)),
        tuning=TUNING,
        versions="; ".join(MADE_OF.values()),
        ablating=f"{ABLATING[0]} to {ABLATING[-1]}",
        judging=f"{JUDGING[0]} to {JUDGING[-1]}",
        again=f"{AGAIN[0]} to {AGAIN[-1]}",
        visible=_visible([*differences.values(), *of_families(found)]),
        visible_elsewhere=_visible_elsewhere(trained),
        families=families_table(found, trained, points, FAMILIES.keys() - COMPLETE.keys()) or EMPTY,
        complete=families_table(found, trained, points, COMPLETE.keys()) or EMPTY,
        told=collections.defaultdict(
            lambda: "not measured yet",
            {name: told(d) for name, d in (differences | _pairs(found)).items()},
        ),
        targets=targets_table(trained) or EMPTY,
        ablations=ablations_table(found, differences, points) or EMPTY,
        nothing=ablations_table(found, again, points) or EMPTY,
        judged=judged_table(trained) or EMPTY,
        rates_on_m=rates_table(trained, points) or EMPTY,
        time=time_table(_times(runs), found, points) or EMPTY,
        full_size=_full_size(trained),
    )
    (folder / "recipe.md").write_text(text, encoding="utf-8")
    if differences:
        _draw(folder / "recipe" / "ablations.png", differences, points)


def _times(runs: pathlib.Path) -> list[dict[str, Any]]:
    """What scripts.maintenance.ablation_time has left beside the runs."""
    path = runs.with_name("time.jsonl")
    return read_records(path) if path.exists() else []


def _pairs(found: Found) -> dict[str, Difference]:
    """Differences of two changes, by what the page calls them."""
    return {
        name: paired(found[one], found[other])
        for name, (one, other) in PAIRS.items()
        if one in found and other in found
    }


def _visible(differences: Sequence[Difference]) -> str:
    seen = visible(differences, len(ABLATING))
    if math.isnan(seen):
        return "not measured yet"
    usual = 2 * statistics.median(d.error for d in differences)
    return (
        f"{seen:.4f}, by the pooled variance of {len(differences)} differences, SOAP's among them, "
        f"which are the noisiest; half of the differences show {usual:.4f}"
    )


def _visible_elsewhere(trained: Mapping[Run, float]) -> str:
    """Of each text of S, and of M's together, at as many seeds as judge there."""
    pooled: dict[str, list[Difference]] = {}
    for board, corpus in judged_cells(trained):
        where = f"S and {TEXTS[corpus]}" if board == "board" else BOARDS[board]
        differences = of_families(by_point(trained, JUDGING, corpus, board))
        pooled.setdefault(where, []).extend(differences)
    seen = {where: visible(of, max((d.n for d in of), default=1)) for where, of in pooled.items()}
    texts = [f"{where} {value:.4f}" for where, value in seen.items() if not math.isnan(value)]
    return ", ".join(texts) or "nothing yet"


def _spent(records: Sequence[Mapping[str, Any]], points: Mapping[str, Point]) -> str:
    """Runs and hours: of tuning and the ablations on S, of judging there, and of M."""
    seconds: dict[str, list[float]] = {}
    for record in records:
        run = Run(**record["settings"])
        known = run.point in points
        config = make_config(points[run.point], run) if known else preset(run.board, RECIPE)
        part = "tuning and ablations on S" if run.seed in (TUNING, *ABLATING) else "judging on S"
        part = part if run.board == "board" else "M"
        seconds.setdefault(part, []).append(record["step_time_s"] * config.schedule.steps)
    parts = [f"{part} {len(of)} runs in {sum(of) / 3600:.1f} hours" for part, of in seconds.items()]
    return f"{len(records)} runs: " + ", ".join(parts)


def _gain(trained: Mapping[Run, float], board: str) -> Difference | None:
    """By how much the recipe's loss on A is below the better Muon's."""
    found = by_point(trained, JUDGING, board=board)
    muon = better_muon(found)
    gain = paired(found[muon], found[RECIPE]) if muon and RECIPE in found else None
    return gain if gain and gain.n > 1 else None


def _full_size(trained: Mapping[Run, float]) -> str:
    """Steps of track 3 that the recipe would save, if its gain on S and A were the same there."""
    gain, more = (_gain(trained, board) for board in BOARDS)
    if gain is None:
        return EMPTY
    least, most = (max(0.0, gain.mean + 2 * s * gain.error) / LOSS_PER_STEP for s in (-1, 1))
    first, last = (round(MUON_STEPS - steps, -1) for steps in (most, least))
    on_m = f", on M and A {more.mean:.4f} ± {more.error:.4f}" if more else ""
    return (
        f"On S and A the recipe ends {gain.mean:.4f} ± {gain.error:.4f} below the better "
        f"Muon{on_m}. If as much as on S were gained on track 3, where {100 * LOSS_PER_STEP:.4f} "
        f"are worth 100 steps by the benchmark's estimate, it would reach 3.28 after {first:.0f} "
        f"to {last:.0f} steps (two standard errors) where Muon's record, #36, needs {MUON_STEPS}; "
        "if the gain faded with size, after as many as Muon."
    )


def _draw(
    path: pathlib.Path, differences: Mapping[str, Difference], points: Mapping[str, Point]
) -> None:
    """Differences with two standard errors, below 0 is better."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [name for name in points if name in differences]
    with matplotlib.rc_context(STYLE | {"font.size": 9}):
        figure = Figure(figsize=(7.5, 1.2 + 0.24 * len(names)), dpi=110, layout="constrained")
        axes = figure.subplots()
        families = dict.fromkeys(points[name].family for name in names)
        for family, colour in zip(families, COLOURS, strict=False):
            rows = [row for row, name in enumerate(names) if points[name].family == family]
            of = [differences[names[row]] for row in rows]
            errors = [2 * d.error for d in of]
            style = {"fmt": "o", "capsize": 3, "color": colour, "label": family}
            axes.errorbar([d.mean for d in of], rows, xerr=errors, **style)
        axes.axvline(0, color="0.6", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.legend(loc="lower left")
        axes.set_xlabel("final loss less that with nothing changed, with two standard errors")
        figure.savefig(path)
