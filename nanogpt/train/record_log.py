"""A run in the layout of the benchmark's own logs: source, machine, settings, losses.

The layout is that of the published logs of modded-nanogpt's track 3: the complete source, a rule of
100 "=", what it ran on, another rule, and a line for every validation. A tool that reads those logs
reads these.
"""

import dataclasses
import json
import math
import pathlib
import re
import sys
from typing import Any

import jax
from jax.extend import backend

from nanogpt.config.run import Config
from nanogpt.train.paths import Lines, Path, replace_text
from nanogpt.train.provenance import output_of, provenance

RULE = "=" * 100
_ROOT = pathlib.Path(__file__).resolve().parents[2]
_LINE = re.compile(r"step:(\d+)/\d+ val_loss:\S+ train_time:([\d.]+)s step_avg:\S+ms")


def source_text() -> str:
    """The code that trains, as one text.

    Returns:
        The program that runs, if it is none of ours and so may hold an own optimizer; every .py
        file of nanogpt, shampoo_jax and data_pipeline, by path.
        Each after a line "# ==== path ====".
    """
    files: list[pathlib.Path] = []
    for package in ("nanogpt", "shampoo_jax", "data_pipeline"):
        files += sorted((_ROOT / package).rglob("*.py"))
    texts = {path.relative_to(_ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}
    program = pathlib.Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    if program.suffix == ".py" and program.resolve() not in files:
        texts = {program.name: program.read_text(encoding="utf-8")} | texts
    return "\n".join(f"# ==== {name} ====\n{text}" for name, text in texts.items())


def environment_text(config: Config) -> str:
    """What a run runs on and with: versions, devices, revision, every setting; several lines."""
    told = provenance()
    device, versions = told["device"], told["versions"]
    platform = " ".join(backend.get_backend().platform_version.split())
    others = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "jax")
    git = f"{told['git_commit'] or 'unknown'}{' with local changes' if told['git_dirty'] else ''}"
    return f"""\
Running JAX {versions["jax"]} ({platform}) on {device["kind"]} with world_size {device["count"]}
processes {jax.process_count()}, {others}
git commit {git}
train_time counts neither compilation nor checkpoints
config {json.dumps(dataclasses.asdict(config))}"""


def devices_text() -> str:
    """What the driver says of its GPUs; where there is none, the devices as JAX lists them."""
    return output_of("nvidia-smi") or "\n".join(str(device) for device in jax.devices())


def record_line(step: int, steps: int, loss: float, seconds: float, step_s: float) -> str:
    """One validation.

    Args:
        step: updates before it.
        steps: updates of the whole run.
        loss: nats per token.
        seconds: training time until then.
        step_s: mean seconds of an update since the validation before; nan at the first.

    Split, as this text is in every log, where the benchmark's plots would take a line for a loss.

    >>> record_line(125, 3375, 4.81815, 52.99, 0.42392).split()
    ['step:125/3375', 'val_loss:4.81815', 'train_time:52.990s', 'step_avg:423.92ms']
    """
    return (
        f"step:{step}/{steps} val_loss:{loss:.5f} train_time:{seconds:.3f}s "
        f"step_avg:{1000 * step_s:.2f}ms"
    )


class RecordLog:
    """Writes the log; every line is on disk when the call returns.

    A resumed run keeps its lines before the checkpoint, says that it was resumed, and repeats
    source and settings if they are not those that the log begins with.

    Args:
        path: the file.
        config: the run.
        source: the code as it was when the run started, see `source_text`.
        resumed: updates done by earlier processes; None for a fresh run.
    """

    def __init__(self, path: Path, config: Config, source: str, resumed: int | None):
        self._path, self._steps = path, config.schedule.steps
        self._step, self._seconds = 0, 0.0
        what = f"{source}\n{RULE}\n{environment_text(config)}\n"
        kept = "" if resumed is None else self._keep_before(resumed)
        if not kept.startswith(what):
            kept += f"{what}{devices_text()}\n{RULE}\n"
        if resumed is not None:
            kept += f"Resumed after {resumed} updates\n"
        replace_text(path, kept)
        self._lines = Lines(path)

    def write(self, kind: str, **fields: Any) -> None:
        """Appends a line for a validation, and nothing for any other record."""
        if kind != "val":
            return
        step, seconds = fields["step"], fields["train_time_s"]
        since = step - self._step
        step_s = (seconds - self._seconds) / since if since else math.nan
        line = record_line(step, self._steps, fields["loss"], seconds, step_s)
        self._lines.write(f"{line}\n")
        self._step, self._seconds = step, seconds

    def close(self) -> None:
        """Nothing is left to do."""

    def _keep_before(self, step: int) -> str:
        """The log without the validations that the resumed run measures again."""
        if not self._path.is_file():
            return ""
        kept = []
        # Nobody reads it back: bytes that a bad disk left there cost no run.
        text = self._path.read_bytes().decode(errors="replace")
        for line in text.splitlines(keepends=True):
            found = _LINE.match(line)
            if found and int(found[1]) >= step:
                continue
            if found:
                self._step, self._seconds = int(found[1]), float(found[2])
            if line.endswith("\n"):  # not cut short by a crash
                kept.append(line)
        return "".join(kept)
