"""Runs of several processes on this machine, or of one with several devices."""

import os
import socket
from collections.abc import Sequence

from scripts.maintenance.faulting.rig import FLAGS, Child, Rig, environment


def start_job(
    rig: Rig,
    name: str,
    *more: str,
    processes: int = 1,
    devices: int = 1,
    accidents: Sequence[str] = (),
) -> list[Child]:
    """Starts all processes of a run.

    Args:
        rig: what is trained.
        name: the run's.
        *more: further words of the command.
        processes: how many.
        devices: of each of them, fake ones.
        accidents: of the first process, see `hooked`.
    """
    flags = os.environ.get("XLA_FLAGS") or FLAGS
    flags += f" --xla_force_host_platform_device_count={devices}"
    place, coordinator = environment(rig.folder / "compiled", flags), []
    if processes > 1:
        coordinator = ["--coordinator-address", _address(), "--num-processes", str(processes)]
    started = []
    for number in range(processes):
        own = [*coordinator, "--process-id", str(number)] if processes > 1 else []
        words = [*rig.words(name, *more), *own]
        hooked = ["scripts.maintenance.faulting.hooked", *accidents, "--"]
        command = hooked if accidents and not number else ["nanogpt"]
        started.append(Child([*command, *words], place))
    return started


def _address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"
