"""The board of track 3: what was published, full-size runs beside it, the page about both."""

import csv
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from nanogpt.config.presets import PUBLISHED
from nanogpt.optimizers.flops import (
    block_shapes,
    model_flops,
    muon_flops,
    shampoo_flops,
    soap_flops,
    step_flops,
)
from nanogpt.report.board import board_table, draw_board
from nanogpt.report.comparable import BENCHMARKS, common_track
from nanogpt.report.curves import COLUMN, PUBLISHED_CURVES, read_curves
from nanogpt.report.groups import Group, read_groups
from nanogpt.report.tables import markdown, page, shown
from nanogpt.report.verdict_tables import acceptance_table, pairwise_rule, pairwise_table, rule
from nanogpt.report.verdicts import TARGET

COMMON = "8 x H100"  # machine of the results whose times are drawn
BASELINE = "#36 Muon, tuned"
NO_RUNS = "No full-size run of this project is among them yet."
BENCHMARK = BENCHMARKS["t3"]
SHAPES = block_shapes(BENCHMARK.model)
MODEL = model_flops(BENCHMARK.model, BENCHMARK.data.batch_rows * BENCHMARK.model.sequence_length)
MUON = muon_flops(SHAPES, 12)  # the first results may have iterated less often
SOAP = soap_flops(SHAPES, 1)


FLOPS = {
    "": 0.0,
    "unknown": 0.0,  # there is no formula
    "muon": MUON,
    "soap": SOAP,
    "soap and muon": SOAP + MUON,
    "shampoo": shampoo_flops(SHAPES, 1),
    "shampoo every 5": shampoo_flops(SHAPES, 5),
}


def read_results() -> list[dict[str, str]]:
    """Reads the published results, in the order of the benchmark's table."""
    lines = (PUBLISHED_CURVES / "results.csv").read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("# ")))


def write_records(
    runs: Sequence[pathlib.Path], curves: pathlib.Path, out: pathlib.Path
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes track3.md, track3.png and track3-dark.png.

    Args:
        runs: folders of full-size runs, drawn beside the published results.
        curves: folder of the published curves.
        out: folder to write into.

    Returns:
        The page and the picture.

    Raises:
        ValueError: runs of another model, batch or validation.
        FileNotFoundError: a curve is missing.
    """
    own = own_groups(runs) if runs else []
    groups = own + [published_group(entry, curves) for entry in read_results()]
    picture = draw_board(
        groups,
        out,
        target=TARGET,
        heading=(
            "Track 3: published results" + (" and runs of this project" if own else ""),
            "FineWeb, GPT of 124M parameters",
        ),
        machine=COMMON,
        name="track3",
    )
    written = out / "track3.md"
    written.write_text(text(groups), encoding="utf-8")
    return written, picture


def own_groups(runs: Sequence[pathlib.Path]) -> list[Group]:
    """Reads runs of ours; their times are drawn if they ran on the common machine.

    Raises:
        ValueError: runs of another model, batch or validation, whose losses mean something else.
    """
    groups = read_groups(runs)
    common_track(["t3_"], {group.start["config"]["name"]: group.start for group in groups})
    return [
        dataclasses.replace(
            group,
            label=f"{group.label}, this project",
            flops_per_step=step_flops(group.start["config"]),
            timed=group.machine.startswith("8 x ") and "H100" in group.machine,
        )
        for group in groups
    ]


def published_group(entry: Mapping[str, str], curves: pathlib.Path) -> Group:
    """Reads a published result.

    Args:
        entry: a row of results.csv: label, file of the runs, value as the benchmark's table
            prints it, machine, own_flops (a key of `FLOPS`), column of losses if another one, and
            the file that is drawn where the first one holds final losses alone.
        curves: folder of the files.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    for name in filter(None, (entry["file"], entry["drawn"])):
        if not (curves / f"{name}.csv").is_file():
            raise FileNotFoundError(
                f"{curves / name}.csv does not exist: --curves must be the folder of the published "
                f"curves, {PUBLISHED_CURVES} by default."
            )
    return Group(
        entry["label"],
        read_curves(curves / f"{entry['file']}.csv", entry["column"] or COLUMN),
        flops_per_step=MODEL + FLOPS[entry["own_flops"]],
        published=entry["value"],
        timed=entry["machine"] == COMMON,
        drawn=read_curves(curves / f"{entry['drawn']}.csv")[0] if entry["drawn"] else None,
        reference=True,
        machine=entry["machine"],
    )


def recipes() -> str:
    """Returns a table of all recipes of track 3: source, result, whether settings are complete."""
    rows = [(name, entry) for name, entry in PUBLISHED.items() if entry.same_model]
    return markdown(
        ["recipe", "source", "settings complete", "step", "runs", "mean loss"],
        [
            [
                name,
                entry.source,
                "yes" if entry.complete else "no",
                shown(entry.expected_steps, ".0f"),
                shown(entry.expected_runs, ".0f"),
                shown(entry.expected_loss, ".5f"),
            ]
            for name, entry in rows
        ],
        texts=3,
    )


def text(groups: Sequence[Group]) -> str:
    """Returns the page: verdicts, comparisons with the baseline, costs, and how to read them."""
    own = [group.label for group in groups if not group.reference]
    baseline = next(group for group in groups if group.label == BASELINE)
    flops = {name: value * 1e-12 for name, value in FLOPS.items()}
    return page(
        "track3",
        ours=f"Runs of this project: {', '.join(own)}." if own else NO_RUNS,
        common=COMMON,
        target=TARGET,
        rule=rule(),
        recipes=recipes(),
        acceptance=acceptance_table(groups),
        pairwise_rule=pairwise_rule(),
        pairwise=pairwise_table([(group, baseline) for group in groups if group is not baseline]),
        flops=flops | {"model": MODEL * 1e-12},
        costs=board_table(groups, target=TARGET, extra={"machine": lambda group: group.machine}),
    )
