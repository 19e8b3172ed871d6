"""Exact resume of every recipe: straight on, or stopped and gone on with in another process."""

import dataclasses
import pathlib
from collections.abc import Iterator

from nanogpt.config.presets import PRESETS
from scripts.maintenance.faulting.outcome import Trial
from scripts.maintenance.faulting.rig import Child, Rig, differences

# Behind the first epoch of 9.3 updates and in the middle of the second one; inside of every
# interval of a recipe, 2, 5, 10 or more updates.
STOPPED = 13


def recipes() -> list[tuple[str, str]]:
    """Every (preset, optimizer) of the registry."""
    return [(preset, name) for preset, names in PRESETS.items() for name in names]


def exact(folder: pathlib.Path, chosen: list[tuple[str, str]]) -> Iterator[Trial]:
    """Trains every recipe straight, and stopped after some updates and gone on with.

    Each of the three, the straight run, the run until its stop, the run that goes on, is done by a
    process of its own, one for all recipes: what goes on is in another process than what stopped,
    and has nothing of it but the folder. (Programs come from the shared folder of compiled ones.)

    Yields:
        A trial for each recipe.
    """
    rigs = {pair: _rig(folder, *pair) for pair in chosen}
    next(iter(rigs.values())).with_shards()
    outputs = [_phase(rigs, phase) for phase in ("straight", "stop", "resume")]
    for (preset, optimizer), rig in rigs.items():
        name = f"{preset}-{optimizer}"
        codes = [output.get(name) for output in outputs]
        if codes != [0, 143, 0]:
            yield Trial("exact resume", name, False, False, f"ended with {codes}")
            continue
        straight, cut = (rig.runs / kind / name for kind in ("straight", "cut"))
        wrong = differences(straight, cut, rig.steps)
        yield Trial("exact resume", name, not wrong, not wrong, ", ".join(wrong[:3]))


def _rig(folder: pathlib.Path, preset: str, optimizer: str) -> Rig:
    more = ("--model.dtype", "float32", "--seed", "3")
    return dataclasses.replace(Rig(folder), optimizer=optimizer, preset=preset, every=0, more=more)


def _phase(rigs: dict[tuple[str, str], Rig], phase: str) -> dict[str, int]:
    """One process that does a phase of all recipes; returns how each ended by name."""
    words, accidents = [], [f"stop={STOPPED}"] if phase == "stop" else []
    for (preset, optimizer), rig in rigs.items():
        kind = "straight" if phase == "straight" else "cut"
        resume = ["--resume"] if phase == "resume" else []
        words += ["--", *rig.words(f"{kind}/{preset}-{optimizer}", *resume)]
    hooked = "scripts.maintenance.faulting.hooked"
    rig = next(iter(rigs.values()))
    ended = Child([hooked, *accidents, *words], rig.environment()).end()
    codes = [int(line.split()[1]) for line in ended.output.splitlines() if line.startswith("ended")]
    names = [f"{preset}-{optimizer}" for preset, optimizer in rigs]
    return dict(zip(names, codes, strict=False))
