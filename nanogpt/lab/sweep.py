"""Trains many runs that differ in a few settings, and records what came out of each.

    nanogpt sweep --optimizers adamw muon --grid matrices.learning_rate=x0.5,x1,x2
    nanogpt sweep --optimizers shampoo --random matrices.b2=lin:0.8:0.99 --runs 12

A value such as x2 is the preset's times 2. Without --random, every combination of the grid is a
trial, or --runs of them; with it, --runs draws, and the combinations of the grid take turns. Every
optimizer gets the same number of trials. What is finished is kept, so that a sweep can be stopped
and started again, or widened; a trial that was stopped goes on from its checkpoint.
runs/NAME/trials.jsonl holds a record a trial; one whose loss diverged is recorded as such.
"""

import argparse
import dataclasses
import hashlib
import os
import pathlib
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from nanogpt.config.presets import PRESETS
from nanogpt.config.run import Config
from nanogpt.lab import compile_cache
from nanogpt.lab.command_line import read_config
from nanogpt.lab.search_space import parse_list, parse_range, points
from nanogpt.report.tables import shown

if TYPE_CHECKING:
    from nanogpt.lab.trials import Trial
    from nanogpt.train.metrics import Record


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in `speedrun`
    compile_cache.use()
    options, rest = parser().parse_known_args(arguments)
    # These import jax, which must see the environment.
    from nanogpt.lab.preset_data import prepare_data
    from nanogpt.lab.trials import run_trials
    from nanogpt.train.interrupt import Interrupted

    signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        trials = make_trials(options, rest)
        path = pathlib.Path(trials[0].config.output.directory, options.name, "trials.jsonl")
        configs = [trial.config for trial in trials]
        for config in {(c.data, c.schedule.steps): c for c in configs}.values():
            prepare_data(config)
        records = run_trials(trials, path, jobs=options.jobs)
    except (ValueError, FileExistsError, FileNotFoundError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except (Interrupted, KeyboardInterrupt) as stopped:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + getattr(stopped, "signum", signal.SIGINT))
    print(f"{table(records)}\n\nrecords: {path}")


def make_trials(options: argparse.Namespace, rest: list[str]) -> "list[Trial]":
    """Returns every optimizer's trials; refuses impossible settings before anything is trained.

    Args:
        options: of the command line.
        rest: settings common to all trials, as in ["--schedule.steps", "100"].

    Raises:
        ValueError: an axis that cannot be read or is named twice, or an unknown setting.
    """
    from nanogpt.lab.trials import Trial

    # Flags are spelt with hyphens and fields with underscores: one axis, however it is spelt.
    lists = [(_field(name), values) for name, values in map(parse_list, options.grid)]
    ranges = [(_field(name), ends) for name, ends in map(parse_range, options.random)]
    names = [name for name, _ in [*lists, *ranges]]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is given {names.count(name)} times: one axis a setting.")
        if name.partition(".")[0] in ("name", "output"):
            raise ValueError(f"--grid {name}: decides no number, so all its trials would be one.")
    chosen = points(dict(lists), dict(ranges), options.runs, options.search_seed)
    trials = []
    for optimizer in options.optimizers:
        base = _read_config(options, optimizer, rest)
        for point in chosen:
            values = {name: _scaled(base, name, value) for name, value in point.items()}
            flags = [word for name, value in values.items() for word in _flag(name, value)]
            config = _read_config(options, optimizer, [*rest, *flags])
            label = ",".join([optimizer, *(f"{name}={v}" for name, v in values.items())])
            folder = f"{options.name}/{_file_name(label)}"
            settings = {"optimizer": optimizer, **{name: _value(config, name) for name in values}}
            trials.append(Trial(settings, dataclasses.replace(config, name=folder)))
    return trials


def table(records: "Sequence[Record]") -> str:
    """Returns a Markdown table of the trials, the best first."""
    columns = list(dict.fromkeys(name for record in records for name in record["settings"]))
    head = [*columns, "validation loss", "step time (ms)"]
    rows = [head, ["-"] * len(columns) + ["-:"] * 2]
    for record in sorted(records, key=lambda record: (record["loss"] is None, record["loss"])):
        loss = "diverged" if record["status"] == "diverged" else f"{record['loss']:.4f}"
        values = [str(record["settings"].get(name, "")) for name in columns]
        rows.append([*values, loss, shown(record["step_time_s"], ".0f", 1e3)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def exit_on_signal(signum: int, frame: FrameType | None) -> None:
    """Signal handler that lets everybody clean up, as Ctrl-C does."""
    sys.exit(128 + signum)


def at_least_one(text: str) -> int:
    """Type of a flag that counts something."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 1")
    return int(text)


def _read_config(options: argparse.Namespace, optimizer: str, settings: list[str]) -> Config:
    """The preset's run with these settings; says whose they are if it has none of that name."""
    try:
        return read_config(options, optimizer, optimizer, settings)
    except SystemExit:
        print(f"error: in the trials of optimizer {optimizer!r}, see above", file=sys.stderr)
        raise


def _file_name(label: str) -> str:
    """The label as far as file systems take one; all do up to 255 bytes."""
    digest = hashlib.sha256(label.encode()).hexdigest()[:12]
    return (label if len(label) <= 200 else f"{label[:180]}-{digest}").replace("/", "_")


def _scaled(base: Config, name: str, value: str) -> str:
    """The value; x2 becomes the preset's value times 2, and stays whole where that is."""
    if not value.startswith("x"):
        return value
    try:
        before = _value(base, name)
        product = float(before) * float(value[1:])
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"--grid {name}={value}: {name} must be a number of the optimizer "
            f"{base.optimizer!r}, and what follows x a factor."
        ) from None
    return repr(int(product) if isinstance(before, int) and product.is_integer() else product)


def _field(name: str) -> str:
    return name.replace("-", "_")


def _value(config: Config, name: str) -> Any:
    found: Any = config
    for field in name.split("."):
        found = getattr(found, field)
    return found


def _flag(name: str, value: str) -> list[str]:
    """Words of the command line; True and False are --name and --no-name there."""
    section, dot, field = name.rpartition(".")
    switches = {"True": [f"--{name}"], "False": [f"--{section}{dot}no-{field}"]}
    return switches.get(value, [f"--{name}", value])


def parser() -> argparse.ArgumentParser:
    """Returns the flags; no abbreviations, since what it does not know is a setting."""
    found = argparse.ArgumentParser(
        prog="nanogpt sweep",
        description=__doc__,
        epilog="Any other flag is a setting of all trials, as of `nanogpt train`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--preset", choices=PRESETS, default="cpu", help="where settings start")
    found.add_argument("--config", metavar="FILE", help="settings of all trials in YAML or JSON")
    found.add_argument(
        "--optimizers", nargs="+", default=["adamw", "muon", "shampoo"], help="as in the preset"
    )
    found.add_argument(
        "--grid", action="append", default=[], metavar="NAME=A,B,...", help="values of a setting"
    )
    found.add_argument(
        "--random",
        action="append",
        default=[],
        metavar="NAME=log:A:B",
        help="draw a setting between A and B; lin for uniform",
    )
    found.add_argument(
        "--runs", type=at_least_one, help="trials an optimizer; default: the whole grid"
    )
    found.add_argument("--search-seed", type=int, default=0, help="of the draws")
    found.add_argument("--name", default="sweep", help="folder of the trials under runs/")
    found.add_argument(
        "--jobs",
        type=at_least_one,
        default=1,
        help="trials side by side, each in a process; CPU only",
    )
    return found


if __name__ == "__main__":
    main()
