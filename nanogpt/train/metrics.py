"""What a run reports: metrics.jsonl on disk, a progress bar or plain lines on the screen."""

import datetime
import json
import math
from typing import Any

import rich.console
import rich.progress
import rich.table

from nanogpt.train.paths import Lines, Path, replace_text

Record = dict[str, Any]


class MetricsWriter:
    """Appends records to a JSONL file, one line each, flushed as they come.

    Numbers that are not finite are written as null: NaN is not JSON.

    Args:
        path: the file; its folder exists.
    """

    def __init__(self, path: Path):
        self._lines = Lines(path)

    def write(self, kind: str, **fields: Any) -> None:
        """Appends {"kind": kind, **fields}."""
        record = {"kind": kind} | {key: _finite(value) for key, value in fields.items()}
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")

    def close(self) -> None:
        """Nothing is left to do."""


def read_records(path: Path) -> list[Record]:
    """Returns the records of a metrics file; a last line cut short by a crash is dropped.

    Raises:
        ValueError: a line before the last is not JSON, or some line is no record; names file and
            line.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file: put the records back, or take another --name.")
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            continue
        if not _is_record(record):
            raise ValueError(
                f"{path}, line {number} is no record, of which kind is a word and step a "
                "number: the file was changed. Put it back, or start anew under another name."
            )
        records.append(record)
    return records


def read_start(path: Path) -> Record:
    """Returns the first record of a run, which has its settings under "config".

    Raises:
        ValueError: as `read_records`, or it is another record or none.
    """
    start = next(iter(read_records(path)), {})
    if start.get("kind") != "start" or not isinstance(start.get("config"), dict):
        raise ValueError(
            f"{path} does not begin with a run's settings: the file was changed. Put it back, or "
            "start anew under another name."
        )
    return start


def _is_record(found: Any) -> bool:
    """Whether a line holds names with values, of which kind and step, if any, are what they say."""
    return (
        isinstance(found, dict)
        and isinstance(found.get("kind", ""), str)
        and type(found.get("step", 0)) is int
        and found.get("step", 0) >= 0
    )


def keep_before(path: Path, step: int, config: Record) -> None:
    """Cuts a metrics file back to a checkpoint, atomically.

    Keeps the first record and whatever was measured before update `step`; the resumed run writes
    the rest again.

    Args:
        path: the file, rewritten; a process more than the job had before has none yet.
        step: updates that the checkpoint holds.
        config: settings of the run that goes on; its schedule may be another one.
    """
    kept = [
        record | ({"config": config} if record.get("kind") == "start" else {})
        for record in (read_records(path) if path.exists() else ())
        if record.get("kind") == "start" or record.get("step", math.inf) < step
    ]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def plain_console() -> rich.console.Console:
    """Returns standard output as runs write to it."""
    return rich.console.Console(highlight=False, soft_wrap=True)


class Progress:
    """One line of live figures on a terminal, a plain line a record anywhere else: a sink, too.

    Args:
        label: the run's name.
        steps: optimizer steps of the whole run.
        done: steps done by an earlier process.
        console: where to draw; standard output by default.
    """

    def __init__(
        self, label: str, steps: int, done: int = 0, console: rich.console.Console | None = None
    ):
        self._console = console or plain_console()
        self._steps = steps
        self._label = label
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn(label, markup=False),
            rich.progress.BarColumn(bar_width=8),
            rich.progress.MofNCompleteColumn(),
            # In a narrow terminal these take a second line; the others keep theirs whole.
            rich.progress.TextColumn(
                "{task.fields[figures]}", markup=False, table_column=rich.table.Column()
            ),
            rich.progress.TextColumn("ETA"),
            rich.progress.TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=steps, completed=done, figures="")
        self._bar.start()

    def advance(self, step: int, figures: Record) -> None:
        """Moves the bar behind step `step`; draws nothing where there is no terminal."""
        self._bar.update(self._task, completed=step + 1, figures=_figures(figures))

    def write(self, kind: str, **fields: Any) -> None:
        """Shows what a terminal's bar does not: validations, and anywhere else the steps, too."""
        if kind == "val":
            bits = fields.get("bits_per_byte")
            shown = f", {bits:.4f} bits per byte" if bits else ""
            loss = f"validation loss {fields['loss']:.5f} nats per token"
            self.note(f"step {fields['step']}: {loss}{shown}")
        elif kind == "train" and not self._console.is_terminal:
            count = f"step {fields['step']:>{len(str(self._steps))}}/{self._steps}"
            left = datetime.timedelta(seconds=round(fields["eta_s"]))
            self.note(f"{count}  {_figures(fields)}  ETA {left}")

    def note(self, message: str) -> None:
        """Prints a line above the bar."""
        self._console.print(f"{self._label}: {message}", markup=False)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.stop()


def _figures(of: Record) -> str:
    parts = [
        f"loss {of['loss']:.4f}",
        f"lr {of['learning_rate']:.3g}",
        f"{of['tokens_per_s']:,.0f} tokens/s",
        f"{of['step_time_s'] * 1e3:.0f} ms/step",
        f"MFU {of['mfu']:.1%}" if of["mfu"] else "",
        f"{of['peak_memory_bytes'] / 1e9:.1f} GB",
        f"{of['skipped']} skipped" if of["skipped"] else "",
    ]
    return "  ".join(part for part in parts if part)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
