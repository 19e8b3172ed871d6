"""What became of trials, counted by kind."""

import dataclasses
import json
import pathlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Trial:
    """One fault and what became of it.

    Attributes:
        kind: of the fault, a row of the table.
        name: of the trial.
        survived: how often what was promised came true: an end in a sentence, nothing lost,
            nothing wrong; True is once.
        exact: the run that went on is the undisturbed one bit for bit; None where nothing goes on.
        told: what the process said, or what failed.
        tried: how often.
    """

    kind: str
    name: str
    survived: int
    exact: bool | None = None
    told: str = ""
    tried: int = 1


def table(trials: list[Trial]) -> list[dict[str, Any]]:
    """Counts trials by kind, in the order of their first appearance."""
    rows = []
    for kind in dict.fromkeys(trial.kind for trial in trials):
        of_kind = [trial for trial in trials if trial.kind == kind]
        exact = [trial.exact for trial in of_kind if trial.exact is not None]
        rows.append(
            {
                "fault": kind,
                "tried": sum(trial.tried for trial in of_kind),
                "survived": sum(trial.survived for trial in of_kind),
                "resumed": len(exact),
                "exact": sum(exact),
            }
        )
    return rows


class Results:
    """Trials on disk, so that what was tried stays when the rest is interrupted.

    Args:
        path: JSON file; trials of parts that are run again are replaced.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.trials = {
            part: [Trial(**trial) for trial in trials]
            for part, trials in found.get("parts", {}).items()
        }
        self.machines: dict[str, Any] = found.get("machines", {})

    def begin(self, part: str, machine: dict[str, Any]) -> None:
        """Forgets the trials of a part that is done again."""
        self.trials[part], self.machines[part] = [], machine

    def add(self, part: str, trial: Trial) -> None:
        """Keeps a trial, and says so."""
        self.trials[part].append(trial)
        verdict = "survived" if trial.survived == trial.tried else "FAILED"
        exact = {None: "", True: ", exact", False: ", NOT EXACT"}[trial.exact]
        print(f"{part}: {trial.kind}, {trial.name}: {verdict}{exact} {trial.told}", flush=True)
        told = {
            "table": table([t for trials in self.trials.values() for t in trials]),
            "machines": self.machines,
            "parts": {
                name: [dataclasses.asdict(t) for t in trials]
                for name, trials in self.trials.items()
            },
        }
        partial = self._path.with_suffix(".tmp")
        partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        partial.replace(self._path)
