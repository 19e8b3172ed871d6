"""Jobs of two processes of which one is killed: the other ends, and both go on."""

import pathlib
import signal
import time
from collections.abc import Iterator

from scripts.maintenance.faulting.jobs import start_job
from scripts.maintenance.faulting.outcome import Trial
from scripts.maintenance.faulting.rig import Rig, differences

# Of the closed connection a process on CPUs hears at once; heartbeats are missed for 100 s.
ENDS_S = 110


def workers(folder: pathlib.Path, trials: int) -> Iterator[Trial]:
    """Kills one of two processes behind a checkpoint, and starts both again.

    Yields:
        Trials: the other process ended within `ENDS_S`, and what went on is exact.
    """
    rig = Rig(folder, steps=40, every=4, more=("--mesh", "data=2")).with_shards()
    ended = [child.end() for child in start_job(rig, "straight", processes=2)]
    if any(end.code for end in ended):
        yield Trial("a worker dies", "straight", False, None, ended[0].last)
        return
    for trial in range(trials):
        name, victim = f"worker-{trial}", trial % 2
        children = start_job(rig, name, processes=2)
        children[0].until(lambda name=name, at=4 * (trial + 1): at in rig.checkpoints(name))
        children[victim].send(signal.SIGKILL)
        begin = time.monotonic()
        code = children[1 - victim].end().code
        seconds = time.monotonic() - begin
        children[victim].end()
        told = f"process {victim} killed, the other ended {code} after {seconds:.1f} s"
        if code == 0 or seconds > ENDS_S:
            yield Trial("a worker dies", name, False, None, told)
            continue
        again = [child.end() for child in start_job(rig, name, "--resume", processes=2)]
        wrong = [end.last for end in again if end.code]
        wrong = wrong or differences(rig.runs / "straight", rig.runs / name, rig.steps)
        yield Trial("a worker dies", name, not wrong, not wrong, "; ".join([told, *wrong[:3]]))
