"""A disk that is really full: a tmpfs of a few hundred kilobytes, which needs root."""

import contextlib
import pathlib
import random
import shutil
import subprocess
from collections.abc import Iterator

from scripts.maintenance.faulting.kills import undisturbed
from scripts.maintenance.faulting.outcome import Trial
from scripts.maintenance.faulting.rig import Rig, arrays, differences


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, kilobytes: int) -> Iterator[pathlib.Path]:
    """Mounts a tmpfs while the block runs.

    Raises:
        PermissionError: this needs root, and the right to mount.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(f"a small disk needs root and the right to mount: {done.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def resize(folder: pathlib.Path, kilobytes: int) -> None:
    """Makes room, or takes it."""
    command = ["mount", "-o", f"remount,size={kilobytes}k", str(folder)]
    subprocess.run(command, check=True)


def full_disks(folder: pathlib.Path, trials: int, seed: int) -> Iterator[Trial]:
    """Fills the disk of a run at any moment, then makes room and goes on.

    Yields:
        Trials: an error in a sentence that says so, checkpoints that can be read, and a run that is
        exact when there is room again.
    """
    rig = Rig(folder, every=2).with_shards()
    undisturbed(rig)
    chance = random.Random(seed)
    try:
        for trial in range(trials):
            with small_disk(folder / "small", chance.randint(550, 2500)) as disk:
                yield _full(rig, disk, f"full-{trial}")
    except PermissionError as error:
        yield Trial("disk full", "no small disk", False, None, str(error))


def _full(rig: Rig, disk: pathlib.Path, name: str) -> Trial:
    kept = ("--output.keep-checkpoints", "99")
    places = ("--output.directory", str(disk))
    ended = rig.start(name, *places, *kept).end()
    saved = disk / name / "checkpoints"
    finished = sorted(int(path.name) for path in saved.glob("*") if path.name.isdigit())
    told = f"checkpoints {finished}, ended {ended.code}: {ended.last[:120]}"
    if not ended.in_a_sentence or "the disk is full" not in ended.output:
        return Trial("disk full", name, False, None, f"{told}")
    for step in finished:
        if int(arrays(saved / str(step))["/step"]) != step:
            return Trial("disk full", name, False, None, f"{told}; {step} is damaged")
    resize(disk, 40_000)
    there = (disk / name / "metrics.jsonl").exists() or saved.exists()
    again = rig.start(name, *places, *kept, *(["--resume"] if there else [])).end()
    if again.code:
        return Trial("disk full", name, False, False, f"{told}; then {again.code}: {again.last}")
    shutil.copytree(disk / name, rig.runs / name)
    wrong = differences(rig.runs / "straight", rig.runs / name, rig.steps)
    return Trial("disk full", name, not wrong, not wrong, "; ".join([told, *wrong[:3]]))
