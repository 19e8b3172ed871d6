"""Runs the parts one after the other in processes that are ended when their time is over.

Only the standard library is imported: a process that holds the device, or that hangs with it, must
not be this one.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from scripts.maintenance.device import records
from scripts.maintenance.device.budget import GRACE_S, Part, allot

ROOT = pathlib.Path(__file__).parents[3]
# A killed process that is not gone after this hangs in its driver.
KILL_S = 5.0


class Child:
    """A process that has a part's modules imported, or is doing so.

    Args:
        command: What it runs; it reads the seconds that it may take from standard input.
        log: File of its output, of no other process: the part before still writes while it waits.
        environment: Of the process.
    """

    def __init__(self, command: list[str], log: pathlib.Path, environment: Mapping[str, str]):
        self._log, self._path = log.open("wb"), log
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            # Compilers and loaders that it starts are ended with it.
            start_new_session=True,
        )

    def run(self, seconds: float) -> tuple[str, str]:
        """Lets it measure for so long at most.

        Returns:
            "done", "failed" or "ended", and the error that goes with the last two.
        """
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(f"{max(seconds - GRACE_S, 1.0)}\n".encode())
            self._process.stdin.close()
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        except BrokenPipeError:
            status = self._await()
        finally:
            killed = self.end()
        if not killed:
            return "ended", "ended, could not be killed; what it had measured is kept"
        if status is None:
            return "ended", f"ended after {seconds:.0f} s; what it had measured by then is kept"
        return ("failed", self._last_error(status)) if status else ("done", "")

    def end(self) -> bool:
        """Ends the process and all that it started; False if it is still there some time later."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        status = self._await()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._log.close()
        return status is not None

    def _await(self) -> int | None:
        """Its status; None if it does not end, as in a driver that hangs."""
        try:
            return self._process.wait(KILL_S)
        except subprocess.TimeoutExpired:
            return None

    def _last_error(self, status: int) -> str:
        text = self._path.read_bytes().decode(errors="replace")
        errors = [line for line in text.splitlines() if line.startswith("ERROR ")]
        if errors:
            return errors[-1].removeprefix("ERROR ")
        last = (text.strip().splitlines() or ["no output"])[-1]
        return f"ended with status {status}: {last[:300]}"


def run_parts(
    parts: tuple[Part, ...],
    deadline: float,
    start: Callable[[Part, pathlib.Path], Child],
    folder: pathlib.Path,
    report: Callable[[str, dict[str, Any]], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Runs parts until they are done or the time is over, and hands over each one's result.

    Args:
        parts: In order.
        deadline: Of the clock.
        start: Begins the process of a part, which writes its figures to the file given.
        folder: For these files.
        report: Takes a part's name and {"state", "seconds", "allotted_s", "figures"} and, where
            the state is not "done", "error". States: "done", "partial" where rows hold errors,
            "failed", "ended", "skipped".
        clock: Of seconds.
    """
    waiting: Child | None = None
    try:
        for i, part in enumerate(parts):
            left = deadline - clock()
            seconds = allot(parts[i:], left)
            if not seconds:
                error = f"not begun: {left:.0f} s were left for {len(parts) - i} parts"
                report(part.name, {"state": "skipped", "error": error, "figures": {}})
                if waiting is not None:
                    waiting.end()
                    waiting = None
                continue
            child = waiting or start(part, _path(folder, part))
            waiting = start(parts[i + 1], _path(folder, parts[i + 1])) if parts[i + 1 :] else None
            begin = clock()
            state, error = "ended", "the report was interrupted; what it had measured is kept"
            try:
                state, error = child.run(seconds)
            finally:
                figures = records.read(_path(folder, part))
                state, error = _judge(state, error, figures)
                times = {"seconds": clock() - begin, "allotted_s": seconds}
                result = {"state": state, **{k: round(v, 1) for k, v in times.items()}}
                result |= {"figures": figures} | ({"error": error} if error else {})
                report(part.name, result)
    finally:
        if waiting is not None:
            waiting.end()


def _judge(state: str, error: str, figures: records.Figures) -> tuple[str, str]:
    """A part that ended well is "partial" where measurements failed or its time was over."""
    rows = [row for group in figures.values() for row in group]
    failed = sum(isinstance(row.get("error"), str) for row in rows)
    if not failed:
        return state, error
    count = f"{failed} of {len(rows)} rows hold an error"
    return ("partial", count) if state == "done" else (state, f"{error}; {count}")


def _path(folder: pathlib.Path, part: Part) -> pathlib.Path:
    return folder / f"{part.name}.jsonl"


def log_path(folder: pathlib.Path, part: Part) -> pathlib.Path:
    """Of the file of a part's output."""
    return folder / f"{part.name}.log"


def command(part: Part, path: pathlib.Path, carried: pathlib.Path, rehearse: bool) -> list[str]:
    """The command of a part's process."""
    module = "scripts.maintenance.device.child"
    words = [sys.executable, "-m", module, part.name, "--records", str(path)]
    return [*words, "--carried", str(carried), *["--rehearse"] * rehearse]
