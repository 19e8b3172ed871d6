"""Stop requests."""

import os
import signal
import subprocess
import sys

import pytest

from nanogpt.train.interrupt import Interrupted, StopSignal, exit_on_stop, stop_request


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_remembered(signum):
    before = signal.getsignal(signum)
    with stop_request() as request:
        assert request.signum is None
        os.kill(os.getpid(), signum)
        assert request.signum == signum
    assert signal.getsignal(signum) is before


def test_second_ctrl_c_is_left_to_the_system():
    before = signal.getsignal(signal.SIGINT)
    with stop_request():
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_a_closed_terminal_may_say_so_twice_and_nohup_is_heeded():
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which would end this process
        with stop_request() as request:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
            assert request.signum == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_request() as request:
            signal.raise_signal(signal.SIGHUP)
            assert request.signum is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), stop_request():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


def test_message_tells_how_to_go_on():
    message = str(Interrupted(signal.SIGTERM, 7, "runs/cpu/muon"))
    assert "SIGTERM after 7 steps" in message
    assert "runs/cpu/muon" in message
    assert "--resume" in message


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_an_exception_with_its_status(signum):
    before = signal.getsignal(signum)
    with pytest.raises(StopSignal) as stopped, exit_on_stop():
        signal.raise_signal(signum)
    assert (stopped.value.code, stopped.value.signum) == (128 + signum, signum)
    assert signal.getsignal(signum) is before


STUCK = """
import hashlib
from nanogpt.train.interrupt import stop_request
with stop_request():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # as XLA does: hears nothing, holds no lock
"""


def test_an_answer_comes_at_once_while_the_main_thread_is_busy():
    command = [sys.executable, "-c", STUCK]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as child:
        try:
            assert child.stdout.readline() == "ready\n"
            child.send_signal(signal.SIGINT)
            assert child.stderr.readline() == "\n"
            assert child.stderr.readline().startswith("SIGINT: stops after the step, or the comp")
            child.send_signal(signal.SIGINT)
            assert child.wait(60) in (128 + signal.SIGINT, -signal.SIGINT)
        finally:
            child.kill()
