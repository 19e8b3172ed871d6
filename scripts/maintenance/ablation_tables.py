"""Tables of docs/recipe.md, and what of the runs stands in them."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from nanogpt.report.paired import Difference, paired
from nanogpt.report.tables import markdown
from scripts.maintenance.ablation_complete import COMPLETE, PLAIN
from scripts.maintenance.ablation_points import (
    ABLATING,
    AGAIN,
    FAMILIES,
    JUDGING,
    TIME,
    TUNING,
    Point,
    Run,
    make_config,
)

Losses = dict[int, float]  # by seed
Found = dict[str, Losses]  # by point
BOARDS = {"board": "S", "board_m": "M"}  # as the page calls them, and texts by their folder
TEXTS = {"board": "A", "prose": "B", "reference": "held out"}  # all that can be judged
RECIPE = "shampoo_next"
BASELINE = "adamw"  # what times are compared with
MUONS = (
    ("muon", "muon_track3"),
    (
        "optax muon()",
        "optax muon(), hidden matrices",
        "optax muon(), hidden, others times 4",
    ),
)


def last_runs(
    runs: Iterable[Run], seeds: Sequence[int], corpus: str = "board", board: str = "board"
) -> dict[str, dict[int, Run]]:
    """Runs of each point at the rates that were taken last, by seed."""
    wanted = [r for r in runs if r.seed in seeds and (r.corpus, r.board) == (corpus, board)]
    last = {run.point: (run.rate, run.auxiliary) for run in wanted}
    found: dict[str, dict[int, Run]] = {}
    for run in wanted:
        if last[run.point] == (run.rate, run.auxiliary):
            found.setdefault(run.point, {})[run.seed] = run
    return found


def by_point(
    trained: Mapping[Run, float],
    seeds: Sequence[int],
    corpus: str = "board",
    board: str = "board",
) -> Found:
    """Losses of each point at the rates that were taken last."""
    found = last_runs(trained, seeds, corpus, board)
    return {name: {s: trained[run] for s, run in runs.items()} for name, runs in found.items()}


def judged_cells(trained: Mapping[Run, float]) -> list[tuple[str, str]]:
    """Boards and texts that were judged, each once."""
    return list(dict.fromkeys((run.board, run.corpus) for run in trained if run.seed in JUDGING))


def better_muon(found: Found) -> str | None:
    """The Muon of the lower loss on the seeds that all Muons have."""
    for names in MUONS:
        if known := [name for name in names if name in found]:
            seeds = set.intersection(*(set(found[name]) for name in known))
            return min(known, key=lambda n: _mean({s: found[n][s] for s in seeds or found[n]}))
    return None


def of_families(found: Found) -> list[Difference]:
    """Differences of all families from the better Muon, of at least two seeds."""
    muon = better_muon(found)
    others = [n for n in FAMILIES if n in found and n != muon and n not in COMPLETE]
    differences = [paired(found[name], found[muon]) for name in others] if muon else []
    return [d for d in differences if d.n > 1]


def _mean(losses: Losses) -> float:
    return math.fsum(losses.values()) / len(losses)


def told(difference: Difference) -> str:
    """A difference with its error, bold where it is told apart."""
    if difference.n < 2:
        return "-"
    text = f"{difference.mean:+.4f} ± {difference.error:.4f}"
    return f"**{text}**" if difference.told_apart else text


def _less(found: Found, name: str, other: str | None) -> str:
    """The difference of two points' losses, where there are both and they are two."""
    if other is None or other == name or other not in found:
        return "-"
    return told(paired(found[name], found[other]))


def _rate(name: str, run: Run, points: Mapping[str, Point]) -> tuple[str, str]:
    config = make_config(points[name], run)
    return f"{config.matrices.learning_rate:.3g}", f"{2.0**run.auxiliary:.3g}"


def _final(name: str, trained: Mapping[Run, float]) -> Run:
    runs = (run for run in reversed(list(trained)) if run.board == "board")
    return next(run for run in runs if run.point == name and run.seed in ABLATING)


def families_table(
    found: Found, trained: Mapping[Run, float], points: Mapping[str, Point], names: Set[str]
) -> str:
    """Losses of families at their own rates."""
    rows, muon = [], better_muon({name: found[name] for name in names & found.keys()})
    for name in sorted(names & found.keys(), key=lambda n: _mean(found[n])):
        # Complete ones have no rate of their own for the others.
        rates = _rate(name, _final(name, trained), points)[: 1 if name in COMPLETE else 2]
        told_of = f"{_mean(found[name]):.4f}", _less(found, name, muon), str(len(found[name]))
        trials = [r for r in trained if r[0] == name and (r.seed, r.board) == (TUNING, "board")]
        rows.append([name, *rates, *told_of, str(len(trials))])
    head = ["optimizer", "rate", "others times", "loss", f"less that of {muon}", "n", "trials"]
    if COMPLETE.keys() >= names:
        head.remove("others times")
    return markdown(head, rows) if rows else ""


def ablations_table(
    found: Found, differences: Mapping[str, Difference], points: Mapping[str, Point]
) -> str:
    """Losses of changes and what they differ by."""
    rows = []
    for name, point in points.items():
        if name in differences:
            difference = told(differences[name])
            mean, n = f"{_mean(found[name]):.4f}", str(differences[name].n)
            rows.append([point.factor, name, point.family, difference, mean, n])
    head = ["factor", "changed to", "of", "difference", "loss", "n"]
    return markdown(head, rows, texts=3) if rows else ""


def judged_table(trained: Mapping[Run, float]) -> str:
    """Every text's losses on seeds that chose nothing, less those of the better Muon.

    Less those of the recipe too; complete optimizers have a table of their own, less `shampoo()`,
    or those of `shampoo()` with the same for the other parameters.
    """
    tables = []
    for complete, ours in ((False, RECIPE), (True, "shampoo()")):
        rows = []
        for (board, corpus), seeds in itertools.product(judged_cells(trained), (JUDGING, AGAIN)):
            all_of_it = by_point(trained, seeds, corpus, board)
            found = {n: losses for n, losses in all_of_it.items() if (n in COMPLETE) == complete}
            text = TEXTS[corpus] + (" again" if seeds is AGAIN else "")
            found = {name: losses for name, losses in found.items() if len(losses) > 1}
            for name in sorted(found, key=lambda n: _mean(found[n])):
                like = ours + PLAIN if complete and COMPLETE[name].plain else ours
                against = [_less(found, name, other) for other in (better_muon(found), like)]
                mean, n = f"{_mean(found[name]):.4f}", str(len(found[name]))
                rows.append([BOARDS[board], text, name, mean, *against, n])
        head = ["board", "text", "optimizer", "loss", "less Muon's", f"less that of {ours}", "n"]
        tables += [markdown(head, rows, texts=3)] if rows else []
    return "\n\n".join(table.strip() for table in tables)


def rates_table(trained: Mapping[Run, float], points: Mapping[str, Point]) -> str:
    """Losses at each rate of the matrices that was tried on M."""
    found: dict[str, list[str]] = {}
    for run in sorted(run for run in trained if (run.board, run.seed) == ("board_m", TUNING)):
        rate, _ = _rate(run.point, run, points)
        found.setdefault(run.point, []).append(f"{trained[run]:.4f} at {rate}")
    rows = [[name, ", ".join(tried)] for name, tried in found.items()]
    return markdown(["optimizer", "losses"], rows, texts=2) if rows else ""


def targets_table(trained: Mapping[Run, float]) -> str:
    """What the recipe and `shampoo()` were to be ahead of, and whether they are."""
    rows = []
    for (board, corpus), seeds in itertools.product(judged_cells(trained), (JUDGING, AGAIN)):
        found = {
            name: losses
            for name, losses in by_point(trained, seeds, corpus, board).items()
            if len(losses) > 1
        }
        muon = better_muon({n: losses for n, losses in found.items() if n not in COMPLETE})
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
                rows.append([*where, verdict, told(difference), str(difference.n)])
    head = ["board", "text", "of", "", "difference", "n"]
    return markdown(head, rows, texts=4) if rows else ""


def time_table(
    times: Sequence[Mapping[str, Any]], found: Found, points: Mapping[str, Point]
) -> str:
    """Losses of runs of fewer steps beside AdamW's, and seconds by the number of cores."""
    if BASELINE not in found:
        return ""
    seconds: dict[int, Found] = {}
    for record in times:
        of_cores = seconds.setdefault(record["cores"], {})
        of_cores.setdefault(record["point"], {})[record["turn"]] = record["seconds"]
    rows = []
    for name in (BASELINE, RECIPE, *(n for n, p in points.items() if p.factor == TIME)):
        if name in found:
            steps = make_config(points[name], Run(name, 0.0, 0.0, 0)).schedule.steps
            row = [name, str(steps), f"{_mean(found[name]):.4f}", _less(found, name, BASELINE)]
            for of_cores in seconds.values():
                mean = f"{_mean(of_cores[name]):.2f}" if name in of_cores else "-"
                row += [mean, _less(of_cores, name, BASELINE) if name in of_cores else "-"]
            rows.append(row)
    head = ["optimizer", "steps", "loss", "less AdamW's"]
    for cores in seconds:
        head += [f"seconds, {cores} core{'s' * (cores > 1)}", "less AdamW's"]
    return markdown(head, rows)
