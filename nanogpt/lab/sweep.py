"""Trains many runs that differ in a few settings, and records what came out of each.

    nanogpt sweep --optimizers adamw muon --grid matrices.learning_rate=x0.5,x1,x2
    nanogpt sweep --optimizers shampoo --random matrices.b2=lin:0.8:0.99 --runs 12

A value such as x2 is the preset's times 2. Without --random, every combination of the grid is a
trial, or --runs of them; with it, --runs draws, and the combinations of the grid take turns. Every
optimizer gets the same number of trials. What is finished is kept, so that a sweep can be stopped
and started again, or widened; a trial that was stopped goes on from its checkpoint.
runs/NAME/trials.jsonl holds a record a trial; one whose loss diverged is recorded as such.
"""

import dataclasses
import difflib
import hashlib
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from nanogpt.config.run import Config
from nanogpt.config.settings import check
from nanogpt.lab import compile_cache
from nanogpt.lab.command import GOES_ON, command
from nanogpt.lab.command_line import DEMO, read_config
from nanogpt.lab.search_space import parse_list, parse_range, points
from nanogpt.report.tables import markdown, shown
from nanogpt.train.interrupt import exit_on_stop

if TYPE_CHECKING:
    from nanogpt.lab.trials import Trial
    from nanogpt.train.metrics import Record

Axes = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclasses.dataclass(frozen=True)
class Options:
    """What a sweep tries."""

    preset: str = "cpu"  # where settings start: track3, cpu or board
    config: str | None = None  # file with settings of all trials, in YAML or JSON
    optimizers: tuple[str, ...] = DEMO  # as in the preset
    grid: Axes = ()  # values of a setting, NAME=A,B,...
    random: Axes = ()  # draw a setting between A and B: NAME=log:A:B; lin for uniform
    runs: int | None = None  # trials an optimizer; None: the whole grid
    search_seed: int = 0  # of the draws
    name: str = "sweep"  # folder of the trials under runs/
    jobs: int = 1  # trials side by side, each in a process; CPU only

    def __post_init__(self):
        check(self, "at least 1", "jobs", *(["runs"] if self.runs is not None else []))


def read(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Separates the flags of a sweep from the settings of all its trials."""
    described = f"{__doc__}\nAny other flag is a setting of all trials, as of `nanogpt train`."
    return tyro.cli(
        Options, prog="nanogpt sweep", description=described, args=arguments,
        return_unknown_args=True,
    )  # fmt: skip


@command(RuntimeError, stopped=GOES_ON)
def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    compile_cache.prepare()
    options, rest = read(arguments)
    # These import jax, which must see the environment.
    from nanogpt.lab.preset_data import prepare_data
    from nanogpt.lab.trials import run_trials

    with exit_on_stop():
        trials = make_trials(options, rest)
        path = pathlib.Path(trials[0].config.output.directory, options.name, "trials.jsonl")
        configs = [trial.config for trial in trials]
        for config in {(c.data, c.schedule.steps): c for c in configs}.values():
            prepare_data(config)
        records = run_trials(trials, path, jobs=options.jobs)
    print(f"{table(records)}\n\nrecords: {path}")


def make_trials(options: Options, rest: list[str]) -> "list[Trial]":
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
        for name in names:
            _check_known(base, optimizer, name)
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
    rows = []
    for record in sorted(records, key=lambda record: (record["loss"] is None, record["loss"])):
        loss = "diverged" if record["status"] == "diverged" else f"{record['loss']:.4f}"
        values = [str(record["settings"].get(name, "")) for name in columns]
        rows.append([*values, loss, shown(record["step_time_s"], ".0f", 1e3)])
    return markdown(head, rows, texts=len(columns))


def _read_config(options: Options, optimizer: str, settings: list[str]) -> Config:
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
    known = list(_settings(base))
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.0)[0]
        raise ValueError(
            f"--grid {name}: is no setting of the optimizer {optimizer!r}; did you mean {near}?"
        )


def _settings(part: Any, before: str = "") -> Iterator[str]:
    """Dotted names of all settings."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{before}{field.name}.")
        else:
            yield before + field.name


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
