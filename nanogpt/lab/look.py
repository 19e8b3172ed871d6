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
) -> None:
    """Draws any set of runs: comparison.png and comparison.md.

    Args:
        runs: folders that hold a metrics.jsonl, here or in gs://
        out: folder of comparison.png and comparison.md
        unchecked: draw runs without a fingerprint, too; the picture says which
        reference: CSV files of published curves, or their names
    """
    from nanogpt.report.comparison import compare as draw

    check_folders(out=out)
    picture = draw(runs, Path(out), reference, unchecked=unchecked)
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

    check_folders(out=out)
    found = read_spectra(path_of(run))
    print(table(found))
    for path in draw_spectra(found, matrices, Path(out)):
        print(f"picture: {path}")
