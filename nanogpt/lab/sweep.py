"""The trials of a sweep, and their table."""

import dataclasses
import difflib
import hashlib
import math
import operator
import pathlib
import statistics
import sys
from collections.abc import Sequence

import jax

from nanogpt.config.run import Config, check_folders
from nanogpt.lab import run_file
from nanogpt.lab.command_line import read_config
from nanogpt.lab.preset_data import prepare_data
from nanogpt.lab.search_space import Sweep, parse_list, parse_range, points
from nanogpt.lab.shared_programs import run_shared
from nanogpt.lab.trials import Trial, run_trials
from nanogpt.report.comparable import PARTS, same_clock
from nanogpt.report.tables import markdown, shown
from nanogpt.train.metrics import Record

SWITCHES = {"True": True, "False": False}


def run_sweep(options: Sweep, rest: list[str]) -> str:
    """Trains what is missing and returns the table; arguments as in `make_trials`."""
    trials = make_trials(options, rest)
    check_folders(**{"output.directory": trials[0].config.output.directory})
    path = pathlib.Path(trials[0].config.output.directory, options.name, "trials.jsonl")
    configs = [trial.config for trial in trials]
    for config in {(c.data, c.schedule.steps): c for c in configs}.values():
        prepare_data(config)
    run = run_shared if options.shared else None
    records = run_trials(trials, path, jobs=options.jobs, run=run)
    return f"{table(records)}\n\nrecords: {path}"


def make_trials(options: Sweep, rest: list[str]) -> list[Trial]:
    """Returns every optimizer's trials; refuses impossible settings before anything is trained.

    Args:
        options: of the command line.
        rest: settings common to all trials, as in ["--schedule.steps", "100"].

    Raises:
        ValueError: an axis that cannot be read or is named twice, or an unknown setting.
    """
    lists, ranges = list(map(parse_list, options.grid)), list(map(parse_range, options.random))
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
        for name in names:
            _check_known(base, optimizer, name)
        for point in chosen:
            values = {name: _scaled(base, name, value) for name, value in point.items()}
            flags = run_file.words({name: SWITCHES.get(v, v) for name, v in values.items()}, base)
            config = _read_config(options, optimizer, [*rest, *flags])
            label = ",".join([optimizer, *(f"{name}={v}" for name, v in values.items())])
            folder = f"{options.name}/{_file_name(label)}"
            found = {name: operator.attrgetter(name)(config) for name in values}
            settings = {"optimizer": optimizer, **found}
            trials.append(Trial(settings, dataclasses.replace(config, name=folder)))
    return trials


def table(records: Sequence[Record]) -> str:
    """Returns a Markdown table of the trials, the best first; with times where one host has all.

    Trials that differ in `seed` alone are one row: mean, number and standard error of their losses.
    Losses of different models or texts are in tables of their own.
    """
    timed = same_clock([record["start"] for record in records])
    alike: dict[tuple, list[Record]] = {}
    for record in records:
        told = record["start"].get("fingerprint") or {}
        alike.setdefault(tuple(told.get(part) for part in PARTS), []).append(record)
    several = "\n\nLosses of these tables are of different models or texts: not one ranking.\n\n"
    return several.join(_table(found, timed) for found in alike.values())


def _table(records: Sequence[Record], timed: bool) -> str:
    columns = list(dict.fromkeys(name for record in records for name in record["settings"]))
    rows: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        key = tuple(str(record["settings"].get(name, "")) for name in columns if name != "seed")
        rows.setdefault(key, []).append(record)
    if seeds := "seed" in columns and len(rows) < len(records):
        columns.remove("seed")
    else:
        rows = {(str(i),): [record] for i, record in enumerate(records)}
    counted = any("refreshed" in record.get("end", {}) for record in records)
    head = [*columns, "validation loss", *["n", "standard error"] * seeds, "step time (ms)"]
    cells = []
    for found in sorted(rows.values(), key=_mean_loss):
        values = [str(found[0]["settings"].get(name, "")) for name in columns]
        cells.append([*values, *_outcome(found, seeds), *_costs(found, timed, counted)])
    head += ["optimizer state (MB)", *["refreshed"] * counted]
    return markdown(head, cells, texts=len(columns))


def _mean_loss(found: Sequence[Record]) -> float:
    """Mean over seeds, inf where one has none."""
    return math.fsum(math.inf if r["loss"] is None else r["loss"] for r in found) / len(found)


def _outcome(found: Sequence[Record], seeds: bool) -> list[str]:
    """Loss, and of several seeds their number and the standard error of the mean."""
    diverged = any(record["status"] == "diverged" for record in found)
    loss = "diverged" if diverged else f"{_mean_loss(found):.4f}"
    if not seeds:
        return [loss]
    error = math.nan
    if len(found) > 1 and not diverged:
        error = statistics.stdev(r["loss"] for r in found) / math.sqrt(len(found))
    return [loss, str(len(found)), shown(error, ".4f")]


def _costs(found: Sequence[Record], timed: bool, counted: bool) -> list[str]:
    """Median time of a step, size of the optimizer's state, mean number of refreshed bases."""
    times = [record["step_time_s"] for record in found if record["step_time_s"] is not None]
    time = statistics.median(times) if timed and times else None
    refreshed = [r["end"]["refreshed"] for r in found if "refreshed" in r.get("end", {})]
    mean = statistics.fmean(refreshed) if refreshed else None
    size = shown(found[0]["start"].get("optimizer_state_bytes"), ".2f", 1e-6)
    return [shown(time, ".0f", 1e3), size, *[shown(mean, ".0f")] * counted]


def _read_config(options: Sweep, optimizer: str, settings: list[str]) -> Config:
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


def _check_known(base: Config, optimizer: str, name: str) -> None:
    """Refuses an axis that the optimizer's runs do not have; says which one may be meant."""
    settings = jax.tree.leaves_with_path(
        dataclasses.asdict(base), is_leaf=lambda part: not isinstance(part, dict)
    )
    known = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in settings]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.0)[0]
        raise ValueError(
            f"--grid {name}: is no setting of the optimizer {optimizer!r}; did you mean {near}?"
        )


def _scaled(base: Config, name: str, value: str) -> str:
    """The value; x2 becomes the preset's value times 2, and stays whole where that is."""
    if not value.startswith("x"):
        return value
    try:
        before = operator.attrgetter(name)(base)
        product = float(before) * float(value[1:])
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"--grid {name}={value}: {name} must be a number of the optimizer "
            f"{base.optimizer!r}, and what follows x a factor."
        ) from None
    return repr(int(product) if isinstance(before, int) and product.is_integer() else product)
