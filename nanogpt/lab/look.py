"""Commands about finished runs. They import what draws when they draw: no help waits for it."""

from pathlib import Path

import tyro

from nanogpt.config.run import check_folders
from nanogpt.lab.command import command, flags
from nanogpt.report.curves import COLUMN, PUBLISHED_CURVES

Paths = tuple[Path, ...]


@command()
@flags
def compare(
    runs: tyro.conf.Positional[tuple[str, ...]],
    out: str = "runs",
    unchecked: bool = False,
    reference: Paths = (),
    target: float | None = None,
) -> None:
    """Draws any set of runs: comparison.png, comparison-dark.png for dark pages, comparison.md.

    Runs that differ in seed and name alone are one curve, with a band. More than eight settings
    are drawn as a board: a row of dots each.

    Args:
        runs: folders that hold a metrics.jsonl, here or in gs://
        out: folder of the pictures and comparison.md
        unchecked: draw runs without a fingerprint, too; the picture says which
        reference: CSV files of published curves, or their names
        target: loss to reach, nats per token; None: AdamW's final one
    """
    from nanogpt.report.comparison import compare as draw

    check_folders(out=out)
    picture = draw(runs, Path(out), reference, unchecked=unchecked, target=target)
    print((Path(out) / "comparison.md").read_text(encoding="utf-8"))
    print(f"picture: {picture}")


@command()
@flags
def verdict(
    runs: tyro.conf.Positional[Paths],
    target: float | None = None,
    unchecked: bool = False,
    column: str = COLUMN,
) -> None:
    """Says what sets of runs prove by the benchmark's rules.

    Give CSV files of published runs, each a set, and folders of runs: those that differ only in
    seed and name make a set. Printed for every set: mean and standard deviation of its losses at
    the earliest step that passes the acceptance rule, or at the last step of all its runs; whether
    it passes; and for every two sets whether one is proven better.

    Args:
        runs: folders; CSV files or their names
        target: loss to reach, nats per token; None: the one of the runs' track
        unchecked: take runs without a fingerprint, too
        column: losses of the CSV files; those of averaged weights are in val_ema_loss
    """
    from nanogpt.report.verdict_tables import verdicts

    print(verdicts(runs, target, unchecked, column))


@command()
@flags
def records(
    runs: tyro.conf.Positional[Paths] = (), curves: Path = PUBLISHED_CURVES, out: str = "runs"
) -> None:
    """Draws the board of track 3: the published results and any full-size runs beside them.

    Writes track3.md and track3.png. Folders of runs are optional; those that differ only in seed
    and name make a set.

    Args:
        runs: folders of full-size runs
        curves: folder of the published curves
        out: folder of track3.md and track3.png
    """
    from nanogpt.report.records import write_records

    check_folders(out=out)
    page, picture = write_records(runs, curves, Path(out))
    print(f"{page}\n{picture}")


@command()
@flags
def spectrum(
    run: tyro.conf.Positional[str], matrices: tuple[str, ...] = (), out: str = "runs"
) -> None:
    """Draws the factors of a run that was trained with --monitor, and prints their last figures.

    Writes spectrum.png, eigenvalues of a few matrices over training with the cutoff, and
    spectrum_map.png, figures of all matrices by step. docs/spectra.md says how to read them.

    Args:
        run: folder that has metrics.jsonl, here or in gs://
        matrices: names or patterns, as in blocks/0/*; none: a few from the first layer to the last
        out: folder of the two pictures
    """
    from nanogpt.report.spectra import draw_spectra, read_spectra, table
    from nanogpt.train.paths import path_of
    from nanogpt.train.stored import expecting_form

    check_folders(out=out)
    found = read_spectra(path_of(run))
    with expecting_form(path_of(run) / "metrics.jsonl"):
        told, pictures = table(found), draw_spectra(found, matrices, Path(out))
    print(told)
    for path in pictures:
        print(f"picture: {path}")


@command()
@flags
def report(
    runs: tyro.conf.Positional[tuple[str, ...]],
    out: str = "runs/report.html",
    unchecked: bool = False,
    target: float | None = None,
) -> None:
    """Writes one HTML file about one run or several, with all that it shows in it.

    Results, curves, spectra of runs trained with --monitor, settings and environment.

    Args:
        runs: folders that hold a metrics.jsonl, here or in gs://
        out: the file
        unchecked: take runs without a fingerprint, too
        target: loss to reach, nats per token; None: AdamW's final one
    """
    from nanogpt.report.document import write_report

    check_folders(out=out)
    print(f"report: {write_report(runs, Path(out), unchecked=unchecked, target=target)}")
