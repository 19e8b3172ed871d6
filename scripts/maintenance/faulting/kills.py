"""Processes killed at random moments and inside of a save, and asked to stop at any."""

import os
import pathlib
import random
import signal
import time
from collections.abc import Iterator

from scripts.maintenance.faulting.outcome import Trial
from scripts.maintenance.faulting.rig import Child, Ended, Rig, differences, stop

STOP_S = 30  # a stop request is obeyed so long after the current step, at most


def undisturbed(rig: Rig) -> float:
    """Trains the run that the others are compared to; returns the seconds of its training."""
    child = rig.start("straight")
    child.until(lambda: child.said("compiled in"))
    begin = time.monotonic()
    ended = child.end()
    if ended.code:
        raise RuntimeError(f"the undisturbed run failed: {ended.output}")
    return time.monotonic() - begin


def kill_at_random(rig: Rig, name: str, after_s: float) -> tuple[str, Ended]:
    """Starts a run and kills it so long after its first step; returns where it was, and its end."""
    child = rig.start(name)
    if child.until(lambda: child.said("compiled in")):
        child.until(lambda: False, 0.001) if after_s < 0 else time.sleep(after_s)
    child.send(signal.SIGKILL)
    return f"checkpoints {rig.checkpoints(name)}", child.end()


def kill_in_save(rig: Rig, name: str, after: int) -> tuple[str, Ended]:
    """Starts a run and kills it while it saves, with so many checkpoints finished before."""
    child = rig.start(name)
    child.frozen(lambda: len(rig.checkpoints(name)) >= after and bool(rig.half_saved(name)))
    child.send(signal.SIGKILL)
    ended = child.end()
    half = [path.name for path in rig.half_saved(name)]
    return f"half a save: {half}, checkpoints {rig.checkpoints(name)}", ended


def gone_on(rig: Rig, kind: str, name: str, told: str, resume: str = "--resume") -> Trial:
    """Goes on with a run to its end, and compares it to the undisturbed one."""
    ended = rig.go_on(name, resume)
    if ended.code:
        return Trial(kind, name, False, False, f"{told}; then {ended.code}: {ended.last}")
    wrong = differences(rig.runs / "straight", rig.runs / name, rig.steps)
    left = [path.name for path in rig.half_saved(name)]
    sound = not wrong and not left
    return Trial(kind, name, sound, not wrong, "; ".join([told, *wrong[:3], *left]))


def kills(folder: pathlib.Path, trials: int, seed: int) -> Iterator[Trial]:
    """Half of the trials at random moments of the training, half inside of a save.

    Yields:
        A trial for each kill; one that came when all was done counts as tried, too.
    """
    rig = Rig(folder, steps=60, every=2).with_shards()
    whole_s = undisturbed(rig)
    chance = random.Random(seed)
    for trial in range(trials):
        name = f"kill-{trial}"
        if trial % 2:
            told, ended = kill_at_random(rig, name, chance.uniform(0, whole_s))
            kind = "kill -9 at random"
        else:
            told, ended = kill_in_save(rig, name, chance.randint(0, 2))
            kind = "kill -9 in a save" if rig.half_saved(name) else "kill -9 behind the last save"
        yield gone_on(rig, kind, name, f"{told}, ended {ended.code}")


def stops(folder: pathlib.Path, trials: int, seed: int) -> Iterator[Trial]:
    """SIGTERM while it compiles, while it resumes, and in the training; and to parents."""
    rig = Rig(folder, steps=600, every=0, more=("--output.log-every", "50")).with_shards()
    undisturbed(rig)
    chance = random.Random(seed)
    for trial in range(trials):
        name = f"stop-{trial}"
        moment = ("training", "compiling")[trial % 2]
        child = rig.start(name)
        said = {"training": "compiled in", "compiling": "compiling"}[moment]
        child.until(lambda child=child, said=said: child.said(said))
        time.sleep(chance.uniform(0, 0.5))
        begin = time.monotonic()
        ended = stop(child)
        seconds = time.monotonic() - begin
        yield _stopped(rig, name, f"SIGTERM while {moment}", ended, seconds)
    yield from _parents(rig)


def _stopped(rig: Rig, name: str, kind: str, ended: Ended, seconds: float) -> Trial:
    told = f"ended {ended.code} after {seconds:.1f} s"
    if ended.code != 128 + signal.SIGTERM or seconds > STOP_S or "Traceback" in ended.output:
        return Trial(kind, name, False, None, f"{told}: {ended.last}")
    return gone_on(rig, kind, name, told)


def _parents(rig: Rig) -> Iterator[Trial]:
    """Commands that start other processes: what they say, and end with, when they are stopped."""
    words = rig.words("parent")[1:]
    own = words.index("--optimizer")
    demo = ["demo", *words[:own], *words[own + 2 :], "--schedule.steps", "200000"]
    seeds = ["train", *words, "--name", "seeds", "--seeds", "2", "--schedule.steps", "200000"]
    for name, command in (("demo", demo), ("train --seeds", seeds)):
        for whom in ("parent", "child alone"):
            child = Child(["nanogpt", *command, "--overwrite"], rig.environment())
            child.until(lambda child=child: child.said("step "))
            begin = time.monotonic()
            if whom == "parent":
                child.send(signal.SIGTERM)
            else:
                for pid in _children(child.process.pid):
                    os.kill(pid, signal.SIGTERM)
            ended = child.end()
            told = f"{whom}: ended {ended.code} after {time.monotonic() - begin:.1f} s"
            said = "stopped" in ended.output and "final loss" not in ended.output
            sound = ended.code == 143 and said and "Traceback" not in ended.output
            yield Trial(f"SIGTERM to {name}", whom, sound, None, f"{told}: {ended.last}")


def _children(pid: int) -> list[int]:
    """Numbers of the processes that train, which a process has started."""
    found = []
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for number in map(int, task.read_text().split()):
            command = pathlib.Path(f"/proc/{number}/cmdline").read_bytes()
            if b"spawn_main" in command:
                found.append(number)
    return found
