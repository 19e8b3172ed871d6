"""Where a run's numbers come from: versions, device, source revision, memory."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
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
    commit, dirty = _git_state()
    return {
        "versions": _versions(),
        "device": _device(),
        "host": platform.node(),
        "argv": sys.argv,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": commit,
        "git_dirty": dirty,
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


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def _device() -> dict[str, Any]:
    device = jax.devices()[0]
    kind = _processor_name() if device.platform == "cpu" else device.device_kind
    return {"platform": device.platform, "kind": kind, "count": jax.device_count()}


def _processor_name() -> str:
    """CPU model and core count; jax calls every processor "cpu"."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {os.cpu_count()} cores"


def _git_state() -> tuple[str | None, bool | None]:
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None, None
    return commit, bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str | None:
    """Output of a git command on the tree that holds this file, None if there is no such tree."""
    folder = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
