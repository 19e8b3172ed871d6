"""Curves of validation losses, and the published ones that are read from CSV files."""

import csv
import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

COLUMN = "val_loss"
PUBLISHED_CURVES = pathlib.Path(__file__).parent / "published"


class Curve(NamedTuple):
    """Validation losses of one run, or their mean over runs."""

    label: str
    steps: Sequence[int]
    losses: Sequence[float]  # nats per token
    seconds: Sequence[float]  # training time


def recorded_curve(label: str, steps: Sequence[int], *columns: Sequence[float | None]) -> Curve:
    """Returns the curve of losses and seconds as JSON has them, null in the place of nan.

    Raises:
        TypeError: one of them is no number.
    """
    # A sum: float() takes words, too.
    losses, seconds = (
        tuple(math.nan if x is None else x + 0.0 for x in column) for column in columns
    )
    return Curve(label, tuple(steps), losses, seconds)


def published_file(path: pathlib.Path) -> pathlib.Path:
    """Returns where a curve lies: a bare name that is no file here is one of the package's own.

    >>> published_file(pathlib.Path("t3_36_muon_tuned_3250.csv")).parent == PUBLISHED_CURVES
    True
    """
    own = PUBLISHED_CURVES / path
    return own if path.name == str(path) and not path.exists() and own.is_file() else path


def read_curves(path: pathlib.Path, column: str = COLUMN) -> list[Curve]:
    """Reads every run of a published result.

    Args:
        path: CSV with columns run, step, train_time_s and `column`, and lines that start with "#".
            An empty time is not known, nan.
        column: which losses; results that average weights have val_ema_loss too.

    Returns:
        One curve a run, called by the file's name and the run's number.

    Raises:
        ValueError: a column is missing, a row is not of numbers, a run has a step twice, or the
            file holds a mean and no runs; names the file.
    """
    rows = _rows(path, column)
    if "run" not in rows[0]:
        raise ValueError(
            f"{path} has no column 'run': it holds a mean, from which nothing can be concluded. "
            "Name the file that holds the runs."
        )
    return _curves(path, rows, column)


def read_reference(path: pathlib.Path) -> Curve:
    """Reads a published result as one curve, the mean of its runs.

    Args:
        path: as `read_curves` takes it; without a column "run" the file holds the mean itself.

    Returns:
        The curve, called by the file's name.

    Raises:
        ValueError: a column is missing, a row is not of numbers, or a run has a step twice; names
            the file.
    """
    return mean_curve(_curves(path, _rows(path, COLUMN), COLUMN), _name(path))


def diverged(curve: Curve) -> bool:
    """Tells whether a run ended no better than it began: worse, or not finite.

    >>> diverged(Curve("a", [0, 1], [6.0, 7.0], [0.0, 1.0]))
    True
    """
    return not curve.losses[-1] <= curve.losses[0]


def common_steps(curves: Sequence[Curve]) -> list[int]:
    """Returns, in order, the steps at which every curve has a loss.

    >>> one = Curve("one", [0, 5, 10], [3.0, 2.0, 1.0], [0.0, 1.0, 2.0])
    >>> common_steps([one, Curve("two", [0, 10], [3.0, 1.0], [0.0, 2.0])])
    [0, 10]
    """
    return sorted(set.intersection(*(set(curve.steps) for curve in curves))) if curves else []


def mean_curve(curves: Sequence[Curve], label: str) -> Curve:
    """Returns the mean over the steps that all curves have."""
    steps = common_steps(curves)
    at = [[curve.steps.index(step) for step in steps] for curve in curves]
    pairs = list(zip(curves, at, strict=True))
    losses = np.mean([[curve.losses[k] for k in places] for curve, places in pairs], axis=0)
    seconds = np.mean([[curve.seconds[k] for k in places] for curve, places in pairs], axis=0)
    return Curve(label, tuple(steps), tuple(losses), tuple(seconds))


def steps_to_reach(curve: Curve, target: float) -> float | None:
    """Returns the updates after which the validation loss first is `target`, None if never.

    Linear interpolation between validations, none after one whose loss is not finite.

    >>> steps_to_reach(Curve("a", [0, 10], [6.0, 4.0], [0.0, 1.0]), 4.5)
    7.5
    """
    before = None
    for step, loss in zip(curve.steps, curve.losses, strict=True):
        if loss <= target:
            if before is None or loss == target:
                return float(step)
            fraction = (before[1] - target) / (before[1] - loss)
            return before[0] + fraction * (step - before[0])
        before = (step, loss) if math.isfinite(loss) else None
    return None


def step_time(curve: Curve) -> float:
    """Returns the median training time of a step in seconds, nan where no times are known."""
    times = np.diff(curve.seconds) / np.diff(curve.steps)
    known = times[np.isfinite(times)]
    return float(np.median(known)) if known.size else math.nan


def _rows(path: pathlib.Path, column: str) -> list[dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: a curve is a CSV file.") from error
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    needed = ("step", column, "train_time_s")
    for name in needed:
        if not rows or name not in rows[0]:
            raise ValueError(f"{path} has no column {name!r}: a curve needs {', '.join(needed)}.")
    return rows


def _curves(path: pathlib.Path, rows: list[dict[str, str]], column: str) -> list[Curve]:
    runs: dict[str, list[tuple[int, float, float]]] = {}
    for row in rows:
        try:
            point = int(row["step"]), float(row[column]), float(row["train_time_s"] or math.nan)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds a row that is no validation: {row}.") from error
        runs.setdefault(row.get("run", ""), []).append(point)
    for run, points in runs.items():
        points.sort(key=lambda point: point[0])
        for (step, *_), (after, *_) in itertools.pairwise(points):
            if step == after:
                raise ValueError(
                    f"{path} has step {step} of run {run!r} twice: give every run a number of its "
                    "own in column 'run'."
                )
    return [
        Curve(f"{_name(path)} {run}".strip(), *zip(*points, strict=True))
        for run, points in runs.items()
    ]


def _name(path: pathlib.Path) -> str:
    return path.name.removesuffix(".csv").removesuffix(".mean")
