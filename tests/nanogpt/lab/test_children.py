"""A command in a process of its own."""

import os
import signal
import subprocess
import sys

CHILD = """
import sys, time
from nanogpt.lab.children import end_with_parent
end_with_parent()
print("started", flush=True)
time.sleep(600)
"""
PARENT = f"""
import sys
from nanogpt.lab.children import run_child
run_child([sys.executable, "-c", {CHILD!r}])
"""


def test_no_child_outlives_a_killed_parent():
    """Both hold the other end of the pipe: it is closed when both have ended."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout.readline() == "started\n"
        os.kill(parent.pid, signal.SIGKILL)
        assert parent.stdout.read() == ""
