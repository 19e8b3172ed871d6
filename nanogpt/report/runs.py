"""One run as its metrics file tells it, and what runs are called."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nanogpt.report.comparable import check_comparable, departure
from nanogpt.report.curves import Curve, diverged, recorded_curve
from nanogpt.report.tables import printable, shorten
from nanogpt.train.metrics import read_records
from nanogpt.train.paths import Path
from nanogpt.train.stored import expecting_form

# Names of the field; a run of an unlisted optimizer is called by its registry name.
TITLES = {
    "adamw": "AdamW",
    "muon": "Muon",
    "muon_track3": "Muon (track 3)",
    "shampoo": "Shampoo",
    "shampoo_next": "Shampoo (recipe)",
}
COLUMNS = ("step", "loss", "train_time_s")  # of a validation's record


class Run(NamedTuple):
    """A run as its metrics file tells it.

    Attributes:
        folder: where it lies.
        start: first record: config, versions, device, sizes, baselines.
        end: last record if the run has ended, by itself or because it diverged; else empty.
        curve: its validations, called by the optimizer; nan where a loss was not finite, and in the
            place of the last one of a run that ended before it because it diverged.
    """

    folder: str
    start: dict[str, Any]
    end: dict[str, Any]
    curve: Curve

    @property
    def optimizer(self) -> str:
        """Registry name of the optimizer of the block matrices."""
        return self.start["config"]["optimizer"]

    @property
    def status(self) -> str:
        """One of "finished", "unfinished", and "diverged": ended no better than it began."""
        if not self.end:
            return "unfinished"
        return "diverged" if diverged(self.curve) else "finished"


def read_run(folder: Path) -> Run:
    """Reads folder/metrics.jsonl.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not begin with a "start" record, holds no validation, or one without
            its figures.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {folder} is not the folder of a run.")
    records = read_records(path)
    validations = [record for record in records if record.get("kind") == "val"]
    if not validations or records[0].get("kind") != "start":
        raise ValueError(f"{path} holds no validation yet: train the run first.")
    start, last = records[0], records[-1]
    with expecting_form(path, ValueError):
        if last.get("kind") == "diverged":
            end = {"step": start["config"]["schedule"]["steps"], "loss": None}
            validations.append(end | {"train_time_s": math.nan})
        columns = [[record[name] for record in validations] for name in COLUMNS]
        optimizer = start["config"]["optimizer"]
        curve = recorded_curve(TITLES.get(optimizer, optimizer), *columns)
        departure(start)
        check_comparable({str(folder): start}, unchecked=True)
    return Run(str(folder), start, last if last.get("kind") in ("end", "diverged") else {}, curve)


def subject(starts: Sequence[Mapping[str, Any]], seeds: str = "") -> str:
    r"""Names data, model and seeds in two lines, as far as runs tell and agree.

    Args:
        starts: their first records.
        seeds: what to say of the seeds; empty: those of `starts`.

    >>> start = {"config": {"seed": 3, "data": {"directory": "data/sotu"}}, "parameters": 1234567}
    >>> subject([start, start | {"parameters": 7}]), subject([start])
    ('data/sotu\nseed 3', 'data/sotu, 1.2M parameters\nseed 3')
    """

    def agreed(form: Callable[[Mapping[str, Any]], str]) -> list[str]:
        told = []
        for start in starts:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                told.append(form(start))
        return told[:1] * (len(told) == len(starts) and len(set(told)) == 1)

    setting = lambda form: agreed(lambda start: form.format(**start["config"]))  # noqa: E731
    found = dict.fromkeys(str(start["config"].get("seed", "unknown")) for start in starts)
    told = ("seed " if len(found) == 1 else "seeds ") + shorten(", ".join(found), 24)
    data = [
        *(shorten(name, 24) for name in setting("{data[directory]}")),
        *setting("GPT of {model[num_layers]} layers, {model[model_dim]} wide"),
        *agreed(lambda start: f"{start['parameters'] / 1e6:.1f}M parameters"),
    ]
    length = [
        *setting("{schedule[steps]} steps"),
        *setting("{data[batch_rows]} x {model[sequence_length]} tokens a step"),
        seeds or told,
    ]
    return f"{', '.join(data)}\n{', '.join(length)}"


def labels(runs: Sequence[Run]) -> list[str]:
    """Calls runs by optimizer; several of one optimizer also by name, those of one by folder."""
    choices = [
        [
            printable(f"{run.curve.label} {more}".strip())
            for more in ("", run.start["config"]["name"], run.folder)
        ]
        for run in runs
    ]
    taken = [label for own in choices for label in own]
    return [next((c for c in own if taken.count(c) == 1), own[-1]) for own in choices]
