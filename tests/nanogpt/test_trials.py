"""Trials: one file, one writer. What they record is tested with the sweep."""

import fcntl
import threading

from nanogpt.trials import run_trials


def test_a_second_process_waits_for_the_file(tmp_path):
    path, said = tmp_path / "sweep" / "trials.jsonl", threading.Event()
    assert run_trials([], path) == []
    second = threading.Thread(
        target=run_trials, args=([], path), kwargs={"say": lambda _: said.set()}
    )
    with open(f"{path}.lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        second.start()
        assert said.wait(30)
        assert second.is_alive()
    second.join(30)
    assert not second.is_alive()
