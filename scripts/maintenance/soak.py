"""Half an hour of the demo's runs under faults, and what came of it: docs/soak.md.

    make soak                       30 minutes of faults
    make soak ARGS="--minutes 5"    less
    make soak ARGS=--go-on          the rest of a soak that was ended

The demo's optimizers are trained in turn by preset cpu. Every run is killed at random moments and
while it saves, asked to stop, left without room on its disk (with root), and goes on each time on
another number of devices, until it is done; when the time is up the last one goes on to its end.
Then each optimizer trains undisturbed, once on each number of devices. A final loss under faults
has to lie within the range of those, and as much on either side: it is one more order of the same
sums. What is done is kept in docs/soak.json after every run.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator

from nanogpt.lab.command_line import DEMO
from nanogpt.train.provenance import provenance
from scripts.maintenance.faulting.disk import resize, small_disk
from scripts.maintenance.faulting.rig import Child, environment

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
DEVICES = (1, 2, 4)
ROOM_KB = 400_000
# How a process may end of what is done to it.
EXPECTED = {
    "kill": -signal.SIGKILL,
    "kill in a save": -signal.SIGKILL,
    "stop": 128 + signal.SIGTERM,
    "no room": 1,
}
KEPT = ("happened", "told", "minutes", "alone", "losses")
REFUSED = "Resume on as many devices"  # by versions that cannot go on with another number


@dataclasses.dataclass
class Soak:
    """What all runs share, and what happened to them.

    Attributes:
        folder: of compiled programs, and of runs where there is no disk.
        steps: of a run.
        chance: decides what happens when, and on how many devices.
        disk: folder of runs, which can be made full; None without root.
        happened: times by fault.
        told: what did not go as it should.
        minutes: of faults so far.
        alone: final losses of undisturbed runs by optimizer, by number of devices.
        losses: optimizer and final loss by run under faults.
    """

    folder: pathlib.Path
    steps: int
    chance: random.Random
    disk: pathlib.Path | None
    happened: Counter[str] = dataclasses.field(default_factory=Counter)
    told: list[str] = dataclasses.field(default_factory=list)
    minutes: float = 0.0
    alone: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    losses: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def runs(self) -> pathlib.Path:
        """The folder of runs."""
        return self.disk or self.folder / "runs"

    def keep(self, docs: pathlib.Path) -> None:
        """Writes what is done, and the page about it."""
        kept = {name: getattr(self, name) for name in KEPT} | {"steps": self.steps}
        (docs / "soak.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        (docs / "soak.md").write_text(page(self), encoding="utf-8")

    def go_on(self, docs: pathlib.Path) -> None:
        """Takes over what an earlier soak of as many steps has kept."""
        kept = json.loads((docs / "soak.json").read_text(encoding="utf-8"))
        if kept["steps"] != self.steps:
            raise ValueError(f"--go-on: that soak has --steps {kept['steps']}.")
        for name in KEPT:
            setattr(self, name, type(getattr(self, name))(kept[name]))

    def start(self, optimizer: str, name: str, devices: int, *more: str) -> Child:
        """Starts a run on a number of devices."""
        words = ["train", "--preset", "cpu", "--optimizer", optimizer, "--name", name]
        words += ["--schedule.steps", str(self.steps), "--output.directory", str(self.runs)]
        words += ["--output.checkpoint-every", "5", "--output.log-every", "5", *more]
        words += ["--mesh", f"data={devices}"] if devices > 1 else []
        flags = f"--xla_force_host_platform_device_count={devices}"
        return Child(["nanogpt", *words], environment(self.folder / "compiled", flags))

    def disturb(self, fault: str, child: Child, run: pathlib.Path) -> None:
        """Does something to a process after a while; nothing where it has ended before."""
        at = time.monotonic() + self.chance.uniform(2, 40)
        child.until(lambda: time.monotonic() > at, 0.05)
        if fault == "kill in a save":
            child.frozen(lambda: any((run / "checkpoints").glob("*.orbax-checkpoint-tmp*")))
        if fault == "no room" and self.disk:
            used = shutil.disk_usage(self.disk).used // 1024
            with contextlib.suppress(subprocess.CalledProcessError):  # it grows meanwhile
                resize(self.disk, used + self.chance.randint(0, 20_000))
            return
        child.send(signal.SIGTERM if fault == "stop" else signal.SIGKILL)


def trained(soak: Soak, optimizer: str, name: str, end_s: float) -> Iterator[str]:
    """Trains a run to its end, with faults until the time is up.

    Where another number of devices is refused, this is noted, and the same number goes on.
    """
    run, before, fixed = soak.runs / name, 0, False
    while True:
        left = (run / "metrics.jsonl").exists() or (run / "checkpoints").exists()
        devices = before if fixed and left else soak.chance.choice(DEVICES)
        child = soak.start(optimizer, name, devices, *(["--resume"] if left else []))
        faults = [fault for fault in EXPECTED if soak.disk or fault != "no room"]
        fault = soak.chance.choice(faults) if time.monotonic() < end_s else "none"
        if fault != "none":
            soak.disturb(fault, child, run)
        end = child.end()
        if soak.disk:
            resize(soak.disk, ROOM_KB)
        yield f"{name}: {fault} on {devices}: ended {end.code}: {end.last}"
        if REFUSED in end.output:
            soak.happened["another number of devices, refused"] += 1
            fixed = True
            continue
        soak.happened["another number of devices"] += bool(left and before not in (0, devices))
        before = devices
        if end.code == 0:
            return
        soak.happened[fault] += 1
        # A process that was asked to stop when it had not begun to listen has not begun at all.
        unheard = end.code == -signal.SIGTERM and fault == "stop" and not end.output
        if not unheard and (end.code != EXPECTED.get(fault) or "Traceback" in end.output):
            last = end.last.replace(f"{soak.runs}/", "")
            soak.told.append(f"{name}: {fault} on {devices}: ended {end.code}: {last}")
        if fault == "none":
            raise RuntimeError(f"{name} does not go on: {end.output[-2000:]}")


def _taken(run: pathlib.Path) -> float:
    """The last validation loss of a run that is done; its folder makes room for the next one."""
    end = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    if end["kind"] != "end":
        raise RuntimeError(f"{run} is not done")
    shutil.rmtree(run)
    return end["loss"]


def undisturbed(soak: Soak, optimizer: str) -> float:
    """Final loss of an optimizer on the next number of devices."""
    devices = DEVICES[len(soak.alone[optimizer])]
    name = f"alone-{optimizer}-{devices}"
    end = soak.start(optimizer, name, devices).end()
    if end.code:
        raise RuntimeError(f"an undisturbed run failed: {end.output[-2000:]}")
    print(f"{name}: {end.last}", flush=True)
    return _taken(soak.runs / name)


def page(soak: Soak) -> str:
    """Returns the report in Markdown."""
    versions = ", ".join(f"{name} {value}" for name, value in provenance()["versions"].items())
    lines = [
        "# Runs under faults",
        "",
        f"`make soak` trained runs of preset cpu, {soak.steps} steps each, for {soak.minutes:.0f} "
        f"minutes under faults, and went on with each until it was done; {versions}.",
        "",
        "| what happened | times |",
        "|-|-|",
        *(f"| {name} | {count} |" for name, count in sorted(soak.happened.items()) if count),
        "",
        f"| run | final loss | undisturbed on {', '.join(map(str, DEVICES))} devices | within |",
        "|-|-|-|-|",
    ]
    for name, (optimizer, loss) in soak.losses.items():
        alone = soak.alone.get(optimizer, [])
        others = ", ".join(f"{value:.5f}" for value in alone)
        if len(alone) < len(DEVICES):
            verdict = "not known yet"
        else:
            within = 2 * min(alone) - max(alone) <= loss <= 2 * max(alone) - min(alone)
            verdict = "yes" if within else "NO"
        lines.append(f"| {name} | {loss:.5f} | {others} | {verdict} |")
    lines += ["", "Within is a loss that lies in the range of the undisturbed ones, or as far on"]
    lines += ["either side of it as that range is wide.", ""]
    if soak.told:
        lines += ["What did not go as it should, or was told in more than a sentence:", ""]
    lines += [f"- {line}" for line in soak.told]
    if soak.disk is None:
        lines.append("No disk was filled: a small one needs root and the right to mount.")
    return "\n".join(lines).rstrip() + "\n"


def disturbed(soak: Soak, optimizer: str, minutes: float) -> None:
    """Trains one run, under faults as long as there are minutes left."""
    name, begin, before = f"{optimizer}-{len(soak.losses)}", time.monotonic(), soak.minutes
    for line in trained(soak, optimizer, name, begin + 60 * (minutes - before)):
        soak.minutes = min(minutes, before + (time.monotonic() - begin) / 60)
        print(line, flush=True)
    soak.losses[name] = optimizer, _taken(soak.runs / name)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser("make soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of faults")
    parser.add_argument("--steps", type=int, default=300, help="of a run")
    parser.add_argument("--go-on", action="store_true", help="with what docs/soak.json has")
    parser.add_argument("--seed", type=int, default=0, help="of moments and faults")
    parser.add_argument("--docs", type=pathlib.Path, default=DOCS, help="folder of the report")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary, contextlib.ExitStack() as stack:
        folder, disk = pathlib.Path(temporary), None
        try:
            disk = stack.enter_context(small_disk(folder / "disk", ROOM_KB))
        except PermissionError as error:
            print(error, file=sys.stderr)
        soak = Soak(folder, options.steps, random.Random(options.seed), disk)
        if options.go_on:
            soak.go_on(options.docs)
            soak.chance.seed(f"{options.seed} {soak.happened.total()}")
        while soak.minutes < options.minutes:
            disturbed(soak, DEMO[len(soak.losses) % len(DEMO)], options.minutes)
            soak.keep(options.docs)
        for optimizer in DEMO:
            soak.alone.setdefault(optimizer, [])
            while len(soak.alone[optimizer]) < len(DEVICES):
                soak.alone[optimizer].append(undisturbed(soak, optimizer))
                soak.keep(options.docs)
        print(page(soak))


if __name__ == "__main__":
    main()
