"""The board of track 3: what was published, full-size runs beside it, the page about both."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from nanogpt.optimizers.flops import (
    block_shapes,
    model_flops,
    muon_flops,
    shampoo_flops,
    soap_flops,
    step_flops,
)
from nanogpt.report.board import board_table, draw_board
from nanogpt.report.curves import COLUMN, PUBLISHED_CURVES, read_curves
from nanogpt.report.groups import Group, read_groups
from nanogpt.report.tracks import BENCHMARK, departure
from nanogpt.report.verdict_tables import acceptance_table, pairwise_rule, pairwise_table, rule
from nanogpt.report.verdicts import TARGET

COMMON = "8 x H100"  # machine of the results whose times are drawn
BASELINE = "#36 Muon, tuned"
SHAPES = block_shapes(BENCHMARK.model)
MODEL = model_flops(BENCHMARK.model, BENCHMARK.data.batch_rows * BENCHMARK.model.sequence_length)
MUON = muon_flops(SHAPES, 12)  # the first results may have iterated less often
SOAP = soap_flops(SHAPES, 1)


class Published(NamedTuple):
    """A published result."""

    label: str
    family: str
    file: str
    value: str  # as the benchmark's table prints it
    machine: str = COMMON
    own_flops: float | None = 0.0  # of a step's optimizer; None: there is no formula
    column: str = COLUMN
    drawn: str = ""  # file of the curve, where `file` holds final losses alone


PUBLISHED = (
    Published("#1 Muon", "Muon", "t3_01_muon_3600", "3.2777 at 3600", "8 GPUs", MUON),
    Published("#2 AdamW", "AdamW", "t3_02_adamw_5625", "3.2790 at 5625", "8 GPUs"),
    Published("#3 Muon", "Muon", "t3_03_muon_3500", "3.2767 at 3500", "8 GPUs", MUON),
    Published("#4 AdamH", "AdamW", "t3_04_adamh_4875", "3.2741 at 4875"),
    Published("#5 MuonH", "MuonH", "t3_05_muonh_3325", "3.2782 at 3325", own_flops=MUON),
    Published("#6 Muon", "Muon", "t3_06_muon_3375", "3.2788 at 3375", own_flops=MUON),
    Published("#12 Muon", "Muon", "t3_12_muon_3325", "3.2790 at 3325", own_flops=MUON),
    Published(
        *("#19 KL-SOAP-H", "SOAP", "t3_19_klsoaph_3125", "3.2780 at 3125"),
        machine="not logged",
        own_flops=None,
    ),
    Published(
        *("#21 Shampoo", "Shampoo", "t3_21_shampoo_4100", "3.2776 at 4100"),
        own_flops=shampoo_flops(SHAPES, 5),
    ),
    Published(
        *("#22 SpectralDescent", "other", "t3_22_spectraldescent_8225", "3.2774 at 8225"),
        machine="1 x H200",
        own_flops=None,
    ),
    Published("#27 SOAP-H", "SOAP", "t3_27_soaph_3125", "3.2782 at 3125", "1 x H100 NVL", SOAP),
    Published("#33 PSGD", "other", "t3_33_psgd_3375", "3.2779 at 3375", own_flops=None),
    Published(
        *("#35 Shampoo", "Shampoo", "t3_35_shampoo_pinv_3375", "3.2767 at 3375", "8 x H200"),
        own_flops=shampoo_flops(SHAPES, 1),
    ),
    Published(BASELINE, "Muon", "t3_36_muon_tuned_3250", "3.2787 at 3250", own_flops=MUON),
    Published(
        *("#37 MuonH, tuned", "MuonH", "t3_37_muonh_tuned_3250", "3.2786 at 3250"), own_flops=MUON
    ),
    Published(
        *("#44 SOAP-Muon", "SOAP-Muon", "t3_44_soapmuon_2750_h100", "3.2789 at 2750", "H100s"),
        own_flops=SOAP + MUON,
    ),
    Published(
        *("#44 on A40", "SOAP-Muon", "t3_44_soapmuon_2750_a40", "2755 steps", "A40s"),
        own_flops=SOAP + MUON,
    ),
    Published(
        *("#45 SOAP-Muon, averaged", "SOAP-Muon", "t3_45_tailema_2720", "3.2786 at 2720", "GH200"),
        own_flops=SOAP + MUON,
    ),
    Published(
        *("#46 SOAP-Muon, floor", "SOAP-Muon", "t3_46_cwd_rowfloor_2690", "3.2783 at 2690"),
        machine="2 x A40",
        own_flops=SOAP + MUON,
        column="val_ema_loss",
    ),
    Published(
        *("PR 353 AdamW, tuned", "AdamW", "t3_pr353_adamw_finals_4950", "3.277604 at 4950"),
        drawn="t3_pr353_adamw_tuned_4950",
    ),
)


def write_records(
    runs: Sequence[pathlib.Path], curves: pathlib.Path, out: pathlib.Path
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes track3.md and track3.png.

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
    groups = own + [published_group(entry, curves) for entry in PUBLISHED]
    picture = draw_board(
        groups,
        out,
        target=TARGET,
        title="Track 3: published results" + (" and runs of this project" if own else ""),
        machine=COMMON,
        name="track3",
    )
    page = out / "track3.md"
    page.write_text(text(groups), encoding="utf-8")
    return page, picture


def own_groups(runs: Sequence[pathlib.Path]) -> list[Group]:
    """Reads runs of ours; their times are drawn if they ran on the common machine.

    Raises:
        ValueError: runs of another model, batch or validation, whose losses mean something else.
    """
    groups = read_groups(runs)
    for group in groups:
        left = departure(group.config)
        if left:
            raise ValueError(
                f"{group.config['name']} has {left}: name full-size runs of preset track3 only."
            )
    return [
        dataclasses.replace(
            group,
            label=f"{group.label}, this project",
            flops_per_step=step_flops(group.config),
            timed=group.machine.startswith("8 x ") and "H100" in group.machine,
        )
        for group in groups
    ]


def published_group(entry: Published, curves: pathlib.Path) -> Group:
    """Reads a published result.

    Raises:
        FileNotFoundError: its CSV file is missing.
    """
    for name in filter(None, (entry.file, entry.drawn)):
        if not (curves / f"{name}.csv").is_file():
            raise FileNotFoundError(
                f"{curves / name}.csv does not exist: --curves must be the folder of the published "
                f"curves, {PUBLISHED_CURVES} by default."
            )
    drawn = read_curves(curves / f"{entry.drawn}.csv")[0] if entry.drawn else None
    return Group(
        entry.label,
        read_curves(curves / f"{entry.file}.csv", entry.column),
        flops_per_step=MODEL + (entry.own_flops or 0.0),
        published=entry.value,
        timed=entry.machine == COMMON,
        drawn=drawn,
        reference=True,
        machine=entry.machine,
        family=entry.family,
    )


def text(groups: Sequence[Group]) -> str:
    """Returns the page: verdicts, comparisons with the baseline, costs, and how to read them."""
    own = [group.label for group in groups if not group.reference]
    ours = f"Runs of this project: {', '.join(own)}." if own else NO_RUNS
    baseline = next(group for group in groups if group.label == BASELINE)
    pairs = [(group, baseline) for group in groups if group is not baseline]
    parts = [
        *("# Track 3: the leaderboard", SOURCE, ours, "![validation loss](track3.png)", PICTURE),
        *("## Verdicts", rule(), acceptance_table(groups), REMARKS),
        *("## Against the baseline", pairwise_rule(), SLOPE, pairwise_table(pairs)),
        *("## Costs", COSTS),
        board_table(groups, target=TARGET, extra={"machine": lambda group: group.machine}),
    ]
    return "\n\n".join(parts) + "\n"


SOURCE = """\
Published results of KellerJordan/modded-nanogpt, records/track_3_optimization, read from the
benchmark's logs (`nanogpt/report/published`). Written by `nanogpt records [FOLDERS OF RUNS]`."""
NO_RUNS = "No full-size run of this project is among them yet."
PICTURE = f"""\
The panel by time shows the results of {COMMON} alone; the logs of #37 begin with some 175 s that
are not training. The enlarged end leaves out curves that end much later than most. #46 is drawn
and read with averaged weights. PR 353 is read from ten runs, of which one curve is known and drawn;
its steps to {TARGET:g} and step time are that run's."""
REMARKS = """\
#1, #2 and #3 are older than the rule. The mean of #6 is 3.2789 and not 3.2788 as printed; it passes
either way. #44 on A40 is printed as a number of steps, without a loss."""
SLOPE = """\
Steps count by the benchmark's slope, which holds for schedules of almost the same length: for
results a thousand steps apart it is an extrapolation."""
COSTS = f"""\
Steps are those of the whole schedule, with the loss there. Operations of a step are
{MODEL * 1e-12:.0f} TFLOP for forward and backward, and the optimizer's matrix products and
decompositions; the formulas are in `nanogpt/optimizers/flops.py`. In TFLOP: Muon with 12 iterations
{MUON * 1e-12:.1f}, Shampoo with roots by eigh every step {shampoo_flops(SHAPES, 1) * 1e-12:.1f},
SOAP with a QR step every step {SOAP * 1e-12:.1f}. KL-SOAP-H, SpectralDescent and PSGD are without
their optimizer's share; SOAP-Muon is counted as SOAP and Muon. Decompositions run far below a GPU's
peak, so times differ by much more than operations. For "H100s" and "A40s" the logs do not say how
many."""
