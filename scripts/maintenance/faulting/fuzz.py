"""Readers of everything that a run reads, on files with faults in them, in this process.

A fault may be refused with an error that the commands turn into a sentence. It must not end the
process, raise anything else, or, where a digest of the file exists, change a number.
"""

import contextlib
import dataclasses
import io
import pathlib
import random
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from scripts.maintenance.faulting.mutants import mutate
from scripts.maintenance.faulting.outcome import Trial

MISPLACED = 0.1  # of the faults are done to whole files: renamed, exchanged, deleted
REFUSALS = (ValueError, OSError, SystemExit)  # what `nanogpt.lab.command` says in a line


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: of the kind.
        make: writes whole files into an empty folder, and returns those to be mutated.
        read: reads what lies in the folder as a run does; returns its numbers.
        digest: whether a wrong number has to be refused.
        sound: tells whether numbers are in their range, where there is no digest.
    """

    name: str
    make: Callable[[pathlib.Path], Sequence[pathlib.Path]]
    read: Callable[[pathlib.Path], Any]
    digest: bool = False
    sound: Callable[[Any], bool] = lambda found: True


def fuzz(kind: Kind, folder: pathlib.Path, count: int, seed: int) -> Trial:
    """Reads many mutants of a kind.

    Returns:
        One trial of `count`: survived are those refused, or read with nothing wrong.
    """
    chance = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    victims = kind.make(folder)
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    whole = kind.read(folder)
    refused, failed = 0, []
    for number in range(count):
        _put_back(folder, kept)
        victim = chance.choice(victims)
        if chance.random() < MISPLACED:
            what = misplace(victim, chance.choice(victims), chance)
        else:
            what = "mutant"
            victim.write_bytes(mutate(kept[victim], chance))
        complaint = _complaint(kind, folder, whole)
        refused += complaint == "refused"
        if complaint not in ("", "refused"):
            failed.append(f"{number}, {what} {victim.relative_to(folder)}: {complaint}")
    told = f"{refused} refused, {count - refused - len(failed)} read"
    return Trial(
        f"fuzz: {kind.name}",
        f"seed {seed}",
        count - len(failed),
        None,
        "; ".join([told, *failed[:3]]),
        count,
    )


def misplace(victim: pathlib.Path, other: pathlib.Path, chance: random.Random) -> str:
    """Does something to a file as a whole; returns what."""
    what = chance.choice(("deleted", "renamed", "exchanged", "folder"))
    if what == "renamed":
        names = (f"{victim.name}x", victim.name[:-1] or "x", "0", "a b\n", "\udcff")
        victim.rename(victim.with_name(chance.choice(names)))
    elif what == "exchanged":
        one, two = victim.read_bytes(), other.read_bytes()
        victim.write_bytes(two)
        other.write_bytes(one)
    else:
        victim.unlink()
        if what == "folder":
            victim.mkdir()
    return what


def _put_back(folder: pathlib.Path, kept: dict[pathlib.Path, bytes]) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()
        elif path.is_dir() and path in kept:
            path.rmdir()
    for path, content in kept.items():
        if not path.exists() or path.read_bytes() != content:  # times are remembered
            path.write_bytes(content)


def _complaint(kind: Kind, folder: pathlib.Path, whole: Any) -> str:
    """What is wrong with how a mutant was read; "refused", or nothing, if all is well."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = kind.read(folder)
    except REFUSALS as error:
        empty = isinstance(error, SystemExit) and not error.code
        return "ended without an error" if empty else "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    if kind.digest and not _same(found, whole):
        return "a wrong number was read"
    return "" if kind.sound(found) else "a number outside of its range was read"


def _same(found: Any, whole: Any) -> bool:
    if isinstance(whole, dict):
        return set(found) == set(whole) and all(_same(found[k], whole[k]) for k in whole)
    return np.asarray(found).tobytes() == np.asarray(whole).tobytes()
