"""Runs that go on on other devices, and in another number of processes: what loss they end with."""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from scripts.maintenance.faulting.jobs import start_job
from scripts.maintenance.faulting.outcome import Trial
from scripts.maintenance.faulting.rig import Child, Ended, Rig

# Arguments of `start_job`, and the mesh.
PLACES: dict[str, tuple[dict[str, Any], str]] = {
    **{f"{n} devices": ({"devices": n}, f"data={n}") for n in (1, 2, 4, 8)},
    "2x4 devices": ({"devices": 8}, "data=2,fsdp=4"),
    **{f"{n} processes": ({"processes": n}, f"data={n}") for n in (2, 4)},
}
UNDISTURBED = ("1 devices", "2 devices", "4 devices", "8 devices", "2x4 devices")
WAYS = (
    *(("8 devices", other) for other in UNDISTURBED if other != "8 devices"),
    ("1 devices", "8 devices"),
    ("8 devices", "4 devices", "2 devices", "1 devices", "2x4 devices", "8 devices"),
    ("2 processes", "1 devices"),
    ("2 processes", "4 processes"),
    ("4 processes", "2 processes", "4 processes"),
)


def moves(folder: pathlib.Path, trials: int) -> Iterator[Trial]:
    """Stops runs in the middle and goes on elsewhere; of `WAYS` the first ones.

    Yields:
        Trials: the final loss lies in the range of five runs that were never stopped, on as many
        kinds of devices, or as far on either side as that range is wide.
    """
    rows = ("--data.batch-rows", "8", "--data.microbatch-rows", "8", "--data.val-tokens", "128")
    rig = Rig(folder, optimizer="shampoo", steps=300, every=0, more=rows).with_shards()
    losses = []
    for place in UNDISTURBED:
        ended = _train(rig, place.replace(" ", "-"), place)
        if ended.code:
            yield Trial("goes on on other devices", place, False, None, ended.last)
            return
        losses.append(_final_loss(rig, place.replace(" ", "-")))
    low, high = min(losses), max(losses)
    for number, way in enumerate(WAYS[:trials]):
        told = _moved(rig, f"moved-{number}", way)
        if not told:
            loss = _final_loss(rig, f"moved-{number}")
            told = f"loss {loss:.7f}, undisturbed {low:.7f} to {high:.7f}"
            sound = 2 * low - high <= loss <= 2 * high - low
        else:
            sound = False
        yield Trial("goes on on other devices", " to ".join(way), sound, None, told)


def _moved(rig: Rig, name: str, way: Sequence[str]) -> str:
    """Trains a run along a way, the steps shared out; returns what went wrong, if anything."""
    leg = rig.steps // len(way)
    for number, place in enumerate(way):
        last = place is way[-1] and number == len(way) - 1
        accidents = [] if last else [f"stop={leg}"]
        ended = _train(rig, name, place, *(["--resume"] if number else []), accidents=accidents)
        if ended.code != (0 if last else 143):
            return f"{place} ended {ended.code}: {ended.last}"
    return ""


def _train(rig: Rig, name: str, place: str, *more: str, accidents: Sequence[str] = ()) -> Ended:
    """Runs all processes to their end; returns that of the first, or of one that failed."""
    sizes, mesh = PLACES[place]
    job: list[Child] = start_job(rig, name, "--mesh", mesh, *more, **sizes, accidents=accidents)
    ends = [child.end() for child in job]
    return next((end for end in ends if end.code != ends[0].code), ends[0])


def _final_loss(rig: Rig, name: str) -> float:
    lines = (rig.runs / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1])["loss"]
