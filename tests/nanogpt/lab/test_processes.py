"""Processes side by side: results, environment, and the end of one that dies."""

import operator
import os
import signal
import subprocess
import sys

import pytest

from nanogpt.lab.processes import in_processes


def test_every_item_has_its_result():
    found = dict(in_processes(operator.neg, range(5), jobs=2))
    assert found == {index: -index for index in range(5)}
    assert dict(in_processes(operator.neg, [], jobs=2)) == {}


def test_cores_are_shared():
    share = max(1, (os.cpu_count() or 1) // 2)
    assert dict(in_processes(os.getenv, ["NPROC"], jobs=2)) == {0: str(share)}


def test_an_error_is_that_of_the_function():
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        list(in_processes(operator.index, ["x"], jobs=1))


def test_a_dead_process_is_reported():
    with pytest.raises(RuntimeError, match="a process died; its last words are above"):
        list(in_processes(os._exit, [1], jobs=1))


KILLED = """
import os, signal, time
from nanogpt.lab.processes import in_processes

results = in_processes(time.sleep, [0, 600], jobs=2)
next(results)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nobody_outlives_a_killed_parent():
    # Returns when the last process that holds the output is gone.
    done = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, timeout=60)
    assert done.returncode < 0


STOPPED = """
import os, signal, sys, time
from nanogpt.lab.processes import in_processes

number = int(sys.argv[1])
# `nohup` and a shell's `&` have some ignored, for all that they start.
interrupt = number == signal.SIGINT
signal.signal(number, signal.default_int_handler if interrupt else signal.SIG_DFL)
for _ in in_processes(time.sleep, [0, 600], jobs=2):
    os.kill(os.getpid(), number)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_processes_and_is_the_status(signum):
    command = [sys.executable, "-c", STOPPED, str(int(signum))]
    done = subprocess.run(command, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (128 + signum, b"")
