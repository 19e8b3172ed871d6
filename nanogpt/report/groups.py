"""Sets of runs that belong together: one setting, several seeds."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from nanogpt.report.comparable import check_comparable
from nanogpt.report.curves import (
    COLUMN,
    Curve,
    diverged,
    mean_curve,
    published_file,
    read_curves,
    step_time,
)
from nanogpt.report.runs import Run, labels, read_run
from nanogpt.report.verdicts import Result, last_result
from nanogpt.train.stored import expecting_form

# What may differ between runs of one set.
FREE = ("seed", "name", "output", "nonfinite_limit")


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one setting.

    Attributes:
        label: what tables and pictures call it; says how many of its runs are not finished.
        runs: every run of that setting.
        step_time_s: median training time of a step in seconds; None: taken from the runs.
        flops_per_step: operations of a step, see `nanogpt.optimizers.flops`; None: not known.
        published: what was published for this setting, as in "3.2787 at 3250 (n=10)".
        timed: whether its times can be compared with the others', as those of one machine can.
        drawn: what pictures show; None: the mean of the runs.
        reference: whether it is a published result, which pictures draw thinner.
        start: the first run's record "start", of a run of ours.
        machine: where it ran.
    """

    label: str
    runs: Sequence[Curve]
    step_time_s: float | None = None
    flops_per_step: float | None = None
    published: str = ""
    timed: bool = True
    drawn: Curve | None = None
    reference: bool = False
    start: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    machine: str = ""

    @property
    def curve(self) -> Curve:
        """The mean of its runs, or what is drawn in its place, called by the group's label."""
        return (self.drawn or mean_curve(self.runs, self.label))._replace(label=self.label)

    @property
    def survivors(self) -> list[Curve]:
        """Its runs that did not diverge."""
        return [run for run in self.runs if not diverged(run)]

    @property
    def shown(self) -> Curve:
        """What pictures show: `curve`, of the survivors if there are some."""
        return dataclasses.replace(self, runs=self.survivors or self.runs).curve

    @property
    def result(self) -> Result:
        """Its runs at the last step of all of them; errors as of `last_result`."""
        return last_result(self.runs)

    @property
    def seconds_per_step(self) -> float:
        """Time of a step, nan where it is not known."""
        return step_time(self.curve) if self.step_time_s is None else self.step_time_s


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
            with expecting_form(folder / "metrics.jsonl"):
                _own([[run]])
                _refuse_repeats([run])
            sets.setdefault(_setting(run), {})[folder.resolve()] = run
    starts = {run.folder: run.start for runs in sets.values() for run in runs.values()}
    check_comparable(starts, unchecked=unchecked)
    own = [list(runs.values()) for runs in sets.values()]
    for runs in own:
        _refuse_repeats(runs)
    return _own(own) + published


def pooled(runs: Sequence[Run]) -> list[Group]:
    """Puts runs of one setting into one set; a seed that is there already begins another one."""
    sets: dict[tuple[str, int], list[Run]] = {}
    turns: collections.Counter[tuple[str, Any]] = collections.Counter()
    for run in runs:
        setting, seed = _setting(run), run.start["config"].get("seed")
        sets.setdefault((setting, turns[setting, seed]), []).append(run)
        turns[setting, seed] += 1
    return _own(list(sets.values()))


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


def _refuse_repeats(runs: Sequence[Run]) -> None:
    """Every run counts as an independent one, which a repeated seed is not."""
    by_seed: dict[int, Run] = {}
    for run in runs:
        first = by_seed.setdefault(run.start["config"]["seed"], run)
        if first is not run:
            raise ValueError(
                f"{first.folder} and {run.folder} are runs of the same setting and seed: they "
                "would count twice. Name the folders to count."
            )


def _own(sets: list[list[Run]]) -> list[Group]:
    """Calls sets as their first runs, and says what became of runs that are not finished."""
    groups = []
    for label, runs in zip(labels([runs[0] for runs in sets]), sets, strict=True):
        start, states = runs[0].start, [run.status for run in runs]
        told = [
            f"{states.count(s)} {s}" if len(runs) > 1 else s
            for s in ("unfinished", "diverged")
            if s in states
        ]
        label += f" ({', '.join(told)})" * bool(told)
        machine = f"{start['device']['count']} x {start['device']['kind']}"
        curves = [run.curve for run in runs]
        groups.append(Group(label, curves, start=start, machine=machine))
    return groups
