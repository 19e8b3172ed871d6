"""Takes every figure that only a GPU can give, part by part, within minutes.

    python -m scripts.maintenance.device_report --minutes 9

Writes <device>.md and <device>.json into the folder of `--out` after every part, and
<device>.log at the end. Parts run in processes of their own, each with its share of the time, and
what they measured is kept when they fail or hang. docs/devices/README.md says how to prepare a
machine without network.
"""

import argparse
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from scripts.maintenance.device import page, supervisor
from scripts.maintenance.device.budget import LEAST_S, PARTS, RESERVE_S, Part, select

ROOT = pathlib.Path(__file__).parents[2]
OUT, REHEARSED = ROOT / "docs" / "devices", ROOT / "runs" / "device"
CARRIED = ROOT / "build" / "device"
LEAST_MINUTES = (LEAST_S + RESERVE_S) / 60
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    args = _parse(arguments)
    if args.page is not None:
        args.page.with_suffix(".md").write_text(args.text, encoding="utf-8")
        return
    deadline = time.monotonic() + 60 * args.minutes
    # Else the parts' processes would outlive this one.
    for number in SIGNALS:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        try:
            parts = select(tuple(args.parts))
            site = install(args.carried / "wheels", folder / "site")
        except (ValueError, RuntimeError) as error:
            sys.exit(f"error: {error}")
        report = Report(args.out, args.minutes, args.rehearse, keep=bool(args.parts))
        environment = _environment(site, folder / "cache", args.rehearse)

        def start(part: Part, path: pathlib.Path) -> supervisor.Child:
            words = supervisor.command(part, path, args.carried.resolve(), args.rehearse)
            return supervisor.Child(words, supervisor.log_path(folder, part), environment)

        try:
            supervisor.run_parts(parts, deadline, start, folder, report.add)
        finally:
            report.finish(folder)
    # A CPU cannot do all that a part measures, so a rehearsal of it may be partial.
    good = ("done", "partial") if args.rehearse else ("done",)
    failed = [name for name, part in report.ran.items() if part["state"] not in good]
    print(f"{report.path('.md')}{': not done: ' + ', '.join(failed) if failed else ''}")
    sys.exit(1 if failed else 0)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="when all must be over")
    parser.add_argument(
        "--out", type=pathlib.Path, help=f"folder to write; {OUT.relative_to(ROOT)}"
    )
    parser.add_argument("--carried", type=pathlib.Path, help="text and wheels")
    parser.add_argument(
        "--parts", nargs="*", default=[], help=f"of {' '.join(part.name for part in PARTS)}"
    )
    parser.add_argument("--rehearse", action="store_true", help="every part, tiny, on a CPU")
    parser.add_argument("--page", type=pathlib.Path, help="write the page of this JSON anew, only")
    args = parser.parse_args(arguments)
    if not (math.isfinite(args.minutes) and args.minutes >= LEAST_MINUTES):
        parser.error(f"--minutes {args.minutes}: must be finite and at least {LEAST_MINUTES}.")
    if args.carried is not None and not args.carried.is_dir():
        parser.error(f"--carried {args.carried}: no such folder.")
    args.carried = args.carried or CARRIED
    args.out = args.out or (REHEARSED if args.rehearse else OUT)
    try:
        if args.page is not None:
            args.text = _page_of(args.page)
        else:
            _refuse_unwritable(args.out)
    except ValueError as error:
        parser.error(str(error))
    return args


def _page_of(path: pathlib.Path) -> str:
    """The page of a report's JSON; raises ValueError if that is missing or no report."""
    try:
        return page.render(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"--page {path}: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"--page {path}: is no report: {type(error).__name__}: {error}") from error


def _refuse_unwritable(out: pathlib.Path) -> None:
    """Raises ValueError where a folder can be neither written nor made."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written: {error.strerror}.") from error


def install(wheels: pathlib.Path, site: pathlib.Path) -> pathlib.Path | None:
    """Unpacks the carried wheels, which then go before the machine's own packages.

    Args:
        wheels: Folder of wheels.
        site: Folder to make.

    Returns:
        `site`; None where nothing is carried and the machine's own packages have to do.

    Raises:
        RuntimeError: pip refuses a wheel, as one for another version of Python.
    """
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        return None
    flags = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
    command = [sys.executable, "-m", "pip", "install", *flags, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise RuntimeError(
            f"{wheels}: {(errors or [done.stderr.strip()[-300:]])[0]} They are for Python 3.12, "
            f"this is {sys.version.split()[0]}; with all packages installed name another folder "
            "by --carried."
        )
    return site


def _environment(site: pathlib.Path | None, cache: pathlib.Path, rehearse: bool) -> dict[str, str]:
    """Of the parts' processes."""
    environment = dict(os.environ)
    paths = [str(site)] if site else []
    paths += [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    # LAPACK's own threads make many small decompositions slower.
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    if rehearse:
        # Programs of a rehearsal are compiled, run once or twice and thrown away.
        flags = environment.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
        return environment | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    # jax puts the kernels that it found fastest for a product beside it, so that later parts need
    # not try them again.
    return environment | {"JAX_COMPILATION_CACHE_DIR": str(cache)}


class Report:
    """The result so far, on disk after every part.

    Args:
        out: Folder.
        minutes: That were given.
        rehearse: Whether its figures mean nothing.
        keep: Whether parts of an earlier report of the device stay until they are taken anew.
    """

    def __init__(self, out: pathlib.Path, minutes: float, rehearse: bool, *, keep: bool = False):
        self._out, self._name = out, "rehearsal" if rehearse else "unknown"
        self._begin, self._keep = time.monotonic(), keep
        # The parts of this run; those of `result` may hold earlier ones.
        self.ran: dict[str, Any] = {}
        self.result: dict[str, Any] = {"minutes": minutes, "rehearsal": rehearse, "parts": {}}
        self._kept = self._earlier() if rehearse else {}

    def path(self, suffix: str) -> pathlib.Path:
        """Of a file of the report."""
        return self._out / (self._name + suffix)

    def add(self, name: str, part: dict[str, Any]) -> None:
        """Takes a part's result and writes everything anew.

        Raises:
            SystemExit: the device is no GPU, and this no rehearsal.
        """
        devices = [] if self.result["rehearsal"] else part["figures"].get("device", [])
        for device in devices:
            if device["platform"] != "gpu":
                sys.exit(
                    f"error: jax found no GPU but {device['kind']!r}: install jax for CUDA, or add "
                    "--rehearse."
                )
            self._rename(slug(device["kind"]))
        self.ran[name] = part
        taken = {
            k: v for k, v in self.ran.items() if v["state"] != "skipped" or k not in self._kept
        }
        parts = self._kept | taken
        order = [known.name for known in PARTS]
        self.result["parts"] = dict(sorted(parts.items(), key=lambda item: order.index(item[0])))
        self.result["seconds"] = round(time.monotonic() - self._begin, 1)
        self._write(".json", json.dumps(self.result, indent=1) + "\n")
        self._write(".md", self._page())
        print(f"{name}: {part['state']} {part.get('error', '')}", flush=True)

    def _rename(self, name: str) -> None:
        """Takes the device's name, with what an earlier report of it holds."""
        if name != self._name:
            # What this run has written before any of its parts knew the device.
            for suffix in (".json", ".md") if self.ran else ():
                self.path(suffix).unlink(missing_ok=True)
            self._name = name
            self._kept = self._earlier()

    def _earlier(self) -> dict[str, Any]:
        """The parts of an earlier report of the same name; one that cannot be read is put aside."""
        path = self.path(".json")
        if not self._keep or not path.exists():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            same = found["rehearsal"] == self.result["rehearsal"]
            known = {part.name for part in PARTS}
            return {k: v for k, v in found["parts"].items() if same and k in known}
        except (ValueError, KeyError, TypeError, AttributeError):
            path.replace(path.with_suffix(".json.unread"))
            return {}

    def _page(self) -> str:
        """The page; its own failure must not cost the parts that are still to be measured."""
        try:
            return page.render(self.result)
        except Exception as error:
            return f"No page: {type(error).__name__}: {error}\n\nMend it and use --page.\n"

    def finish(self, folder: pathlib.Path) -> None:
        """Keeps the parts' output, one after the other."""
        logs = {part.name: supervisor.log_path(folder, part) for part in PARTS}
        texts = [
            f"== {name}\n{path.read_text(encoding='utf-8', errors='replace').strip()}\n"
            for name, path in logs.items()
            if path.exists()
        ]
        if texts and self.result["parts"]:
            self._write(".log", "".join(texts))

    def _write(self, suffix: str, text: str) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        partial = self.path(suffix + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path(suffix))


def slug(kind: str) -> str:
    """A file's name for a kind of device.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-") or "unknown"


if __name__ == "__main__":
    main()
