"""Where a run's numbers come from: versions, device, source revision, memory."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import resource
import subprocess
import sys
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "grain", "numpy")


def provenance() -> dict[str, Any]:
    """Returns what a reader needs to repeat the run on the same footing.

    Returns:
        {"versions": {package: version}, "device": {...}, "host": str, "argv": [str], "started":
        str (UTC, ISO 8601), "git_commit": str | None, "git_dirty": bool | None}; the last two are
        None outside a git checkout.
    """
    device = jax.devices()[0]
    kind = _processor_name() if device.platform == "cpu" else device.device_kind
    git = ("git", "-C", str(pathlib.Path(__file__).parent))
    commit = output_of(*git, "rev-parse", "HEAD")
    changes = output_of(*git, "status", "--porcelain", "--untracked-files=no")
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "device": {"platform": device.platform, "kind": kind, "count": jax.device_count()},
        "host": platform.node(),
        "argv": sys.argv,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": commit,
        "git_dirty": None if commit is None else bool(changes),
    }


def peak_memory_bytes() -> int:
    """Returns the most memory that this process has held so far, in bytes.

    Accelerators report their own high-water mark; on CPU it is the resident set of the process.
    """
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def output_of(*command: str) -> str | None:
    """Returns what a command prints, None where it is missing, fails or takes half a minute."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor_name() -> str:
    """CPU model and core count; jax calls every processor "cpu"."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    model = found[1] if found else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"
