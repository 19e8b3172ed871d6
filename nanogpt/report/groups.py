"""Sets of runs that belong together: one setting, several seeds."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from nanogpt.report.comparable import check_comparable
from nanogpt.report.comparison import Run, read_run
from nanogpt.report.curves import COLUMN, Curve, mean_curve, published_file, read_curves, step_time

# What may differ between runs of one set.
FREE = ("seed", "name", "output", "nonfinite_limit")


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one setting.

    Attributes:
        label: what tables and pictures call it.
        runs: every run of that setting.
        step_time_s: median training time of a step in seconds; None: taken from the runs.
        flops_per_step: operations of a step, see `nanogpt.optimizers.flops`; None: not known.
        published: what was published for this setting, as in "3.2787 at 3250 (n=10)".
        timed: whether its times can be compared with the others', as those of one machine can.
        drawn: what pictures show; None: the mean of the runs.
        reference: whether it is a published result, which pictures draw thinner.
        config: the configuration of the first run, of a run of ours; see
        `nanogpt.config.run.Config`. machine: where it ran.
        family: groups of one family share a colour and differ in dashes; empty: a family alone.
    """

    label: str
    runs: Sequence[Curve]
    step_time_s: float | None = None
    flops_per_step: float | None = None
    published: str = ""
    timed: bool = True
    drawn: Curve | None = None
    reference: bool = False
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    machine: str = ""
    family: str = ""

    @property
    def curve(self) -> Curve:
        """What pictures show, called by the group's label."""
        return (self.drawn or mean_curve(self.runs, self.label))._replace(label=self.label)

    @property
    def seconds_per_step(self) -> float | None:
        """Time of a step, None where it is not known."""
        time = step_time([self.curve]) if self.step_time_s is None else self.step_time_s
        return time if math.isfinite(time) else None


def read_groups(
    paths: Sequence[pathlib.Path], column: str = COLUMN, *, unchecked: bool = False
) -> list[Group]:
    """Reads sets of runs.

    Args:
        paths: CSV files of published runs, each a set; folders of runs, or folders that hold such
            folders at any depth. Of those, runs whose configurations agree in everything but seed,
            name and output make a set.
        column: which losses of the CSV files.
        unchecked: take runs without a fingerprint, too.

    Returns:
        The sets, those of folders called by optimizer, in order of appearance.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without runs.
        ValueError: no path, a file that is no curve, a run that has no validation yet, two of one
            setting and seed, or runs that cannot be compared, see `nanogpt.report.comparable`.
    """
    if not paths:
        raise ValueError("no runs: name folders of runs or CSV files of published ones.")
    published = []
    sets: dict[str, dict[pathlib.Path, Run]] = {}
    for path in map(published_file, paths):
        if path.is_file():
            name = path.name.removesuffix(".csv")
            published.append(Group(name, read_curves(path, column), reference=True))
            continue
        for folder in run_folders(path):
            run = read_run(folder)
            sets.setdefault(_setting(run), {})[folder.resolve()] = run
    starts = {str(folder): run.start for runs in sets.values() for folder, run in runs.items()}
    check_comparable(starts, unchecked=unchecked)
    for runs in sets.values():
        _refuse_repeats(runs)
    return _own([list(runs.values()) for runs in sets.values()]) + published


def run_folders(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders of runs at or below a path, in order of their names.

    Raises:
        FileNotFoundError: there are none.
    """
    found = sorted(file.parent for file in path.rglob("metrics.jsonl"))
    if not found:
        raise FileNotFoundError(
            f"{path} does not exist or holds no metrics.jsonl: no run is there."
        )
    return found


def _setting(run: Run) -> str:
    config = {key: value for key, value in run.start["config"].items() if key not in FREE}
    return json.dumps(config, sort_keys=True)


def _refuse_repeats(runs: Mapping[pathlib.Path, Run]) -> None:
    """Every run counts as an independent one, which a repeated seed is not."""
    by_seed: dict[int, pathlib.Path] = {}
    for folder, run in runs.items():
        first = by_seed.setdefault(run.start["config"]["seed"], folder)
        if first != folder:
            raise ValueError(
                f"{first} and {folder} are runs of the same setting and seed: they would count "
                "twice. Name the folders to count."
            )


def _own(sets: list[list[Run]]) -> list[Group]:
    """Calls sets of the same optimizer by the first run's name too."""
    names = [runs[0].label for runs in sets]
    groups = []
    for name, runs in zip(names, sets, strict=True):
        config, device = runs[0].start["config"], runs[0].start["device"]
        label = f"{name} {config['name']}" if names.count(name) > 1 else name
        machine = f"{device['count']} x {device['kind']}"
        curves = [run.curve for run in runs]
        groups.append(Group(label, curves, config=config, machine=machine))
    return groups
