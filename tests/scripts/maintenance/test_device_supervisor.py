"""Parts in processes of their own: they end, fail, hang, and the report goes on."""

import os
import subprocess
import sys
import time

import pytest

from scripts.maintenance.device import records, supervisor
from scripts.maintenance.device.budget import Part

PARTS = tuple(Part(name, 1, name) for name in ("a", "b", "c"))


def child(tmp_path, script, *arguments, log="log"):
    """A process that runs a script; its words are the arguments."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return supervisor.Child(command, tmp_path / log, os.environ)


def wait_for(path):
    """Until a process has written a file; a minute is for a machine that is busy."""
    for _ in range(600):
        if path.exists() and path.read_text().endswith("\n"):
            return path.read_text()
        time.sleep(0.1)
    pytest.fail(f"{path} was never written")


def test_a_part_that_ends_well_gets_its_seconds(tmp_path):
    script = "import sys; open(sys.argv[1], 'w').write(sys.stdin.readline())"
    assert child(tmp_path, script, tmp_path / "seconds").run(60.0) == ("done", "")
    assert float((tmp_path / "seconds").read_text()) == 60.0 - supervisor.GRACE_S


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (
            "print('ERROR ValueError: edge=3: odd.'); print('more'); exit(1)",
            "ValueError: edge=3: odd.",
        ),
        ("print('before'); print('last'); exit(3)", "ended with status 3: last"),
        ("import os; os.kill(os.getpid(), 11)", "ended with status -11: no output"),
    ],
)
def test_a_part_that_fails_tells_its_error(tmp_path, script, error):
    assert child(tmp_path, f"input(); {script}").run(60.0) == ("failed", error)


def test_the_error_of_a_part_that_waits_is_its_own(tmp_path):
    waiting = child(tmp_path, "print('ERROR of the one that waits', flush=True); input()", log="b")
    try:
        wait_for(tmp_path / "b")
        failing = child(tmp_path, "input(); print('mine'); exit(3)", log="a")
        assert failing.run(60.0) == ("failed", "ended with status 3: mine")
    finally:
        waiting.end()


def test_every_part_has_a_log_of_its_own(tmp_path):
    assert supervisor.log_path(tmp_path, PARTS[0]) != supervisor.log_path(tmp_path, PARTS[1])


def test_a_process_that_cannot_be_killed_does_not_hold_the_report_up(tmp_path, monkeypatch):
    stuck = child(tmp_path, "import time; time.sleep(1000)")
    process = stuck._process

    def never(seconds=None):
        raise subprocess.TimeoutExpired("x", seconds)

    monkeypatch.setattr(process, "wait", never)
    assert stuck.run(0.1) == ("ended", "ended, could not be killed; what it had measured is kept")
    monkeypatch.undo()
    process.wait(60)


def test_a_part_that_hangs_is_ended_with_all_it_started_and_its_figures_are_kept(tmp_path):
    script = """
import subprocess, sys, time
sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
open(sys.argv[1], "w").write('{"group": "g", "name": "x", "seconds": 1}' + chr(10))
open(sys.argv[2], "w").write(str(sleeper.pid) + chr(10))
time.sleep(1000)
"""
    figures, pid = tmp_path / "a.jsonl", tmp_path / "pid"
    hanging = child(tmp_path, script, figures, pid)
    sleeper = int(wait_for(pid))
    state, error = hanging.run(0.2)
    assert state == "ended" and error.startswith("ended after 0 s")
    assert records.read(figures) == {"g": [{"name": "x", "seconds": 1}]}
    assert not _runs(sleeper)


def _runs(pid):
    """Whether a process is there and no zombie that nobody has waited for yet."""
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return False
        except FileNotFoundError:
            return False
        time.sleep(0.1)
    return True


class Stand:
    """Stands for a process: it takes some seconds of a clock and ends as it is told."""

    def __init__(self, clock, takes, outcome):
        self.clock, self.takes, self.outcome, self.ended = clock, takes, outcome, False

    def run(self, seconds):
        self.clock[0] += min(self.takes, seconds)
        self.ended = True
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def end(self):
        self.ended = True


def run(tmp_path, takes, outcomes, minutes=5.0, parts=PARTS):
    """Runs three parts by stand-ins; returns their results, and the stand-ins by part."""
    clock, stands, results = [0.0], {}, {}

    def start(part, path):
        i = parts.index(part)
        path.write_text(f'{{"group": "g", "of": "{part.name}"}}\n')
        return stands.setdefault(part.name, Stand(clock, takes[i], outcomes[i]))

    supervisor.run_parts(
        parts, 60 * minutes, start, tmp_path, results.__setitem__, clock=lambda: clock[0]
    )
    return results, stands


DONE = ("done", "")


def test_a_failed_part_leaves_its_error_and_its_figures_and_the_next_goes_on(tmp_path):
    results, _ = run(tmp_path, [10, 10, 10], [DONE, ("failed", "ValueError: x"), DONE])
    assert [r["state"] for r in results.values()] == ["done", "failed", "done"]
    assert results["b"]["error"] == "ValueError: x" and "error" not in results["a"]
    assert results["b"]["figures"] == {"g": [{"of": "b"}]}
    assert [r["seconds"] for r in results.values()] == [10, 10, 10]


def test_a_part_with_errors_of_measurements_is_partial_and_they_are_counted(tmp_path):
    def start(part, path):
        rows = ['{"group": "g", "x": 1}', '{"group": "g", "name": "y", "error": "no"}']
        path.write_text("\n".join(rows) + "\n")
        return Stand([0.0], 1, DONE)

    results = {}
    supervisor.run_parts(PARTS[:1], time.monotonic() + 60, start, tmp_path, results.__setitem__)
    assert results["a"]["state"] == "partial"
    assert results["a"]["error"] == "1 of 2 rows hold an error"


def test_what_is_left_over_is_given_to_those_that_follow(tmp_path):
    results, _ = run(tmp_path, [0, 0, 0], [DONE] * 3)
    assert [r["allotted_s"] for r in results.values()] == [98.3, 147.5, 295.0]


def test_parts_without_time_are_skipped_and_no_process_is_left(tmp_path):
    results, stands = run(tmp_path, [1000] * 3, [("ended", "ended after")] * 3, minutes=0.75)
    assert [r["state"] for r in results.values()] == ["ended", "ended", "ended"]
    results, stands = run(tmp_path, [1000] * 3, [("ended", "ended after")] * 3, minutes=0.5)
    assert [r["state"] for r in results.values()] == ["ended", "ended", "skipped"]
    assert results["c"]["error"] == "not begun: 10 s were left for 1 parts"
    assert all(stand.ended for stand in stands.values())


def test_a_part_that_is_skipped_while_it_waits_is_ended_and_no_other_is_started(tmp_path):
    outcomes = [DONE, ("failed", "it was not b's turn"), DONE]
    results, stands = run(tmp_path, [1000] * 3, outcomes, minutes=0.3)
    assert [r["state"] for r in results.values()] == ["done", "skipped", "skipped"]
    assert stands["b"].ended and "c" not in stands


def test_an_interrupted_report_keeps_the_part_that_ran_and_ends_the_one_that_waited(tmp_path):
    clock, stands, results = [0.0], {}, {}

    def start(part, path):
        path.write_text('{"group": "g", "x": 1}\n')
        outcome = SystemExit(143) if part.name == "a" else DONE
        return stands.setdefault(part.name, Stand(clock, 10, outcome))

    with pytest.raises(SystemExit):
        supervisor.run_parts(
            PARTS, 300.0, start, tmp_path, results.__setitem__, clock=lambda: clock[0]
        )
    assert results["a"]["state"] == "ended" and results["a"]["figures"] == {"g": [{"x": 1}]}
    assert "interrupted" in results["a"]["error"]
    assert list(results) == ["a"] and stands["b"].ended and "c" not in stands
