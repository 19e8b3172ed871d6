"""Page and picture of `scripts.maintenance.ablations`."""

import collections
import itertools
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence, Set
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from nanogpt.config.presets import preset
from nanogpt.lab.trials import read_trials
from nanogpt.report.paired import Difference, paired, visible
from nanogpt.report.plotting import COLOURS, STYLE
from nanogpt.report.tables import markdown
from nanogpt.report.verdicts import LOSS_PER_STEP
from scripts.maintenance.ablation_points import (
    ABLATED,
    ABLATING,
    AGAIN,
    COMPLETE,
    FAMILIES,
    JUDGING,
    NOTHING,
    PLAIN,
    TIME,
    TUNING,
    Point,
    Run,
    loss,
    make_config,
)

TEXT = pathlib.Path(__file__).with_name("ablation_page.md")
Losses = dict[int, float]  # by seed
Found = dict[str, Losses]  # by point
BOARDS = {"board": "S", "board_m": "M"}  # as the page calls them, and texts by their folder
TEXTS = {"board": "A", "prose": "B", "reference": "held out"}
RECIPE, MUON_STEPS = "shampoo_next", 3250  # steps of #36 on track 3
ON_S = ("board", "board")  # text and board
BASELINE = "adamw"  # what times are compared with
MUONS = (
    ("muon", "muon_track3"),
    (
        "optax muon()",
        "optax muon(), hidden matrices",
        "optax muon(), hidden, others times 4",
    ),
)
PAIRS = {
    "bounds": ("kl_soap(max_scale=relative)" + PLAIN, "kl_soap()" + PLAIN),
    "look ahead": ("shampoo()", "shampoo()" + PLAIN),
    "place of eps": ("soap eps 0_3 after", "soap eps 0_3 before"),
}
EMPTY = "Nothing has been trained yet."


def write(folder: pathlib.Path, runs: pathlib.Path, points: Mapping[str, Point]) -> None:
    """Writes recipe.md and recipe/ablations.png of the runs that are there."""
    records = read_trials(runs)
    trained = {Run(**r["settings"]): loss(r) for r in records}
    found = _by_point(trained, ABLATING)
    same = [p for p in points.values() if p.factor == NOTHING and p.name in found]
    unchanged = {point.family: found[point.name] for point in same}
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
        ablating=f"{ABLATING[0]} to {ABLATING[-1]}",
        judging=f"{JUDGING[0]} to {JUDGING[-1]}",
        again=f"{AGAIN[0]} to {AGAIN[-1]}",
        visible=_visible([*differences.values(), *_of_families(found)]),
        visible_elsewhere=_visible_elsewhere(trained),
        families=_families(found, trained, points, FAMILIES.keys() - COMPLETE.keys()),
        complete=_families(found, trained, points, COMPLETE.keys()),
        told=collections.defaultdict(
            lambda: "not measured yet",
            {name: _told(d) for name, d in (differences | _pairs(found)).items()},
        ),
        targets=_targets(trained) or EMPTY,
        ablations=_ablations(found, differences, points) or EMPTY,
        nothing=_ablations(found, again, points) or EMPTY,
        judged=_judged(trained) or EMPTY,
        rates_on_m=_rates_on_m(trained, points) or EMPTY,
        time=_time(records, found, points) or EMPTY,
        full_size=_full_size(trained),
    )
    (folder / "recipe.md").write_text(text, encoding="utf-8")
    if differences:
        _draw(folder / "recipe" / "ablations.png", differences, points)


def _by_point(
    trained: Mapping[Run, float],
    seeds: Sequence[int],
    corpus: str = "board",
    board: str = "board",
) -> Found:
    """Losses of each point at the rates that were taken last."""
    wanted = [
        run for run in trained if run.seed in seeds and (run.corpus, run.board) == (corpus, board)
    ]
    last = {run.point: (run.rate, run.auxiliary) for run in wanted}
    found: Found = {}
    for run in wanted:
        if last[run.point] == (run.rate, run.auxiliary):
            found.setdefault(run.point, {})[run.seed] = trained[run]
    return found


def _pairs(found: Found) -> dict[str, Difference]:
    """Differences of two changes, by what the page calls them."""
    return {
        name: paired(found[one], found[other])
        for name, (one, other) in PAIRS.items()
        if one in found and other in found
    }


def _of_families(found: Found) -> list[Difference]:
    muon = _better_muon(found)
    others = [n for n in FAMILIES if n in found and n != muon and n not in COMPLETE]
    differences = [paired(found[name], found[muon]) for name in others] if muon else []
    return [d for d in differences if d.n > 1]


def _visible(differences: Sequence[Difference]) -> str:
    seen = visible(differences, len(ABLATING))
    if math.isnan(seen):
        return "not measured yet"
    usual = 2 * statistics.median(d.error for d in differences)
    return (
        f"{seen:.4f}, by the pooled variance of {len(differences)} differences, SOAP's among them, "
        f"which are the noisiest; half of the differences show {usual:.4f}"
    )


def _cells(trained: Mapping[Run, float]) -> list[tuple[str, str]]:
    """Boards and texts that were judged, each once."""
    return list(dict.fromkeys((run.board, run.corpus) for run in trained if run.seed in JUDGING))


def _visible_elsewhere(trained: Mapping[Run, float]) -> str:
    """Of each text of S, and of M's together, at as many seeds as judge there."""
    pooled: dict[str, list[Difference]] = {}
    for board, corpus in _cells(trained):
        where = f"S and {TEXTS[corpus]}" if board == "board" else BOARDS[board]
        differences = _of_families(_by_point(trained, JUDGING, corpus, board))
        pooled.setdefault(where, []).extend(differences)
    seen = {where: visible(of, max((d.n for d in of), default=1)) for where, of in pooled.items()}
    told = [f"{where} {value:.4f}" for where, value in seen.items() if not math.isnan(value)]
    return ", ".join(told) or "nothing yet"


def _rate(name: str, run: Run, points: Mapping[str, Point]) -> tuple[str, str]:
    config = make_config(points[name], run)
    return f"{config.matrices.learning_rate:.3g}", f"{2.0**run.auxiliary:.3g}"


def _final(name: str, trained: Mapping[Run, float]) -> Run:
    runs = (run for run in reversed(list(trained)) if run.board == "board")
    return next(run for run in runs if run.point == name and run.seed in ABLATING)


def _families(
    found: Found, trained: Mapping[Run, float], points: Mapping[str, Point], names: Set[str]
) -> str:
    rows, muon = [], _better_muon({name: found[name] for name in names & found.keys()})
    for name in sorted(names & found.keys(), key=lambda n: _mean(found[n])):
        # Complete ones have no rate of their own for the others.
        rates = _rate(name, _final(name, trained), points)[: 1 if name in COMPLETE else 2]
        against = _less(found, name, muon)
        rows.append([name, *rates, f"{_mean(found[name]):.4f}", against, str(len(found[name]))])
    head = ["optimizer", "rate", "others times", "loss", f"less that of {muon}", "n"]
    if COMPLETE.keys() >= names:
        head.remove("others times")
    return markdown(head, rows) if rows else EMPTY


def _less(found: Found, name: str, other: str | None) -> str:
    """The difference of two points' losses, where there are both and they are two."""
    if other is None or other == name or other not in found:
        return "-"
    return _told(paired(found[name], found[other]))


def _better_muon(found: Found) -> str | None:
    for names in MUONS:
        if known := [name for name in names if name in found]:
            seeds = set.intersection(*(set(found[name]) for name in known))
            return min(known, key=lambda n: _mean({s: found[n][s] for s in seeds or found[n]}))
    return None


def _ablations(
    found: Found, differences: Mapping[str, Difference], points: Mapping[str, Point]
) -> str:
    rows = []
    for name, point in points.items():
        if name in differences:
            told = _told(differences[name])
            mean, n = f"{_mean(found[name]):.4f}", str(differences[name].n)
            rows.append([point.factor, name, point.family, told, mean, n])
    head = ["factor", "changed to", "of", "difference", "loss", "n"]
    return markdown(head, rows, texts=3) if rows else ""


def _judged(trained: Mapping[Run, float]) -> str:
    """Every text's losses on seeds that chose nothing, less those of the better Muon.

    Less those of the recipe too; complete optimizers have a table of their own, less `shampoo()`,
    or those of `shampoo()` with the same for the other parameters.
    """
    tables = []
    for complete, ours in ((False, RECIPE), (True, "shampoo()")):
        rows = []
        for (board, corpus), seeds in itertools.product(_cells(trained), (JUDGING, AGAIN)):
            all_of_it = _by_point(trained, seeds, corpus, board)
            found = {n: losses for n, losses in all_of_it.items() if (n in COMPLETE) == complete}
            text = TEXTS[corpus] + (" again" if seeds is AGAIN else "")
            found = {name: losses for name, losses in found.items() if len(losses) > 1}
            for name in sorted(found, key=lambda n: _mean(found[n])):
                like = ours + PLAIN if name.endswith(PLAIN) else ours
                against = [_less(found, name, other) for other in (_better_muon(found), like)]
                mean, n = f"{_mean(found[name]):.4f}", str(len(found[name]))
                rows.append([BOARDS[board], text, name, mean, *against, n])
        head = ["board", "text", "optimizer", "loss", "less Muon's", f"less that of {ours}", "n"]
        tables += [markdown(head, rows, texts=3)] if rows else []
    return "\n\n".join(table.strip() for table in tables)


def _rates_on_m(trained: Mapping[Run, float], points: Mapping[str, Point]) -> str:
    found: dict[str, list[str]] = {}
    for run in sorted(run for run in trained if (run.board, run.seed) == ("board_m", TUNING)):
        rate, _ = _rate(run.point, run, points)
        found.setdefault(run.point, []).append(f"{trained[run]:.4f} at {rate}")
    rows = [[name, ", ".join(tried)] for name, tried in found.items()]
    return markdown(["optimizer", "losses"], rows, texts=2) if rows else ""


def _targets(trained: Mapping[Run, float]) -> str:
    """What the recipe and `shampoo()` were to be ahead of, and whether they are."""
    rows = []
    for (board, corpus), seeds in itertools.product(_cells(trained), (JUDGING, AGAIN)):
        found = {
            name: losses
            for name, losses in _by_point(trained, seeds, corpus, board).items()
            if len(losses) > 1
        }
        muon = _better_muon({n: losses for n, losses in found.items() if n not in COMPLETE})
        others = (*MUONS[1], "optax adamw()")
        pairs = [(RECIPE, muon or ""), *(("shampoo()", name) for name in others)]
        for ours, other in pairs:
            if {ours, other} <= found.keys():
                difference = paired(found[ours], found[other])
                text = TEXTS[corpus] + (" again" if seeds is AGAIN else "")
                verdict = "not told apart"
                if difference.told_apart:
                    verdict = "ahead" if difference.mean < 0 else "behind"
                where = [BOARDS[board], text, f"{ours} less {other}"]
                rows.append([*where, verdict, _told(difference), str(difference.n)])
    head = ["board", "text", "of", "", "difference", "n"]
    return markdown(head, rows, texts=4) if rows else ""


def _time(records: Sequence[Mapping[str, Any]], found: Found, points: Mapping[str, Point]) -> str:
    """Seconds of whole runs, of those of fewer steps beside those of AdamW."""
    if BASELINE not in found:
        return ""
    rows = []
    for name in (BASELINE, RECIPE, *(n for n, p in points.items() if p.factor == TIME)):
        if name in found:
            steps = make_config(points[name], Run(name, 0.0, 0.0, 0)).schedule.steps
            step = statistics.median(
                record["step_time_s"]
                for record in records
                if record["settings"]["point"] == name
                and record["settings"]["seed"] in ABLATING
                and (record["settings"]["corpus"], record["settings"]["board"]) == ON_S
            )
            against = "-" if name == BASELINE else _told(paired(found[name], found[BASELINE]))
            times = [f"{1e3 * step:.1f}", f"{step * steps:.2f}"]
            rows.append([name, str(steps), f"{_mean(found[name]):.4f}", against, *times])
    head = ["optimizer", "steps", "loss", "less AdamW's", "ms a step", "seconds"]
    return markdown(head, rows)


def _spent(records: Sequence[Mapping[str, Any]], points: Mapping[str, Point]) -> str:
    seconds = 0.0
    for record in records:
        run = Run(**record["settings"])
        shorter = points[run.point].changes.get("schedule.steps") if run.point in points else None
        seconds += record["step_time_s"] * (shorter or preset(run.board, RECIPE).schedule.steps)
    return f"{len(records)} runs, {seconds / 3600:.1f} hours of one or two cores, mostly shared"


def _gain(trained: Mapping[Run, float], board: str) -> Difference | None:
    """By how much the recipe's loss on A is below the better Muon's."""
    found = _by_point(trained, JUDGING, board=board)
    muon = _better_muon(found)
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


def _told(difference: Difference) -> str:
    if difference.n < 2:
        return "-"
    told = f"{difference.mean:+.4f} ± {difference.error:.4f}"
    return f"**{told}**" if difference.told_apart else told


def _mean(losses: Losses) -> float:
    return math.fsum(losses.values()) / len(losses)


def _draw(
    path: pathlib.Path, differences: Mapping[str, Difference], points: Mapping[str, Point]
) -> None:
    """Differences with two standard errors, below 0 is better."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [name for name in points if name in differences]
    with matplotlib.rc_context(STYLE | {"font.size": 9}):
        figure = Figure(figsize=(7.5, 1.2 + 0.24 * len(names)), dpi=110, layout="constrained")
        axes = figure.subplots()
        for family, colour in zip(ABLATED, COLOURS, strict=False):
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
