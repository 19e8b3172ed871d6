"""A function on many items, in processes of their own: one after another or side by side."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from nanogpt.train.interrupt import Interrupted, StopSignal, exit_on_stop


def in_processes(
    function: Callable[[Any], Any], items: Sequence[Any], jobs: int
) -> Iterator[tuple[int, Any]]:
    """Applies a function to every item, in `jobs` fresh processes that take one after another.

    Every process gets an equal share of the cores, so that they do not take turns on all of them,
    and none gets a Ctrl-C from the terminal: a signal that asks to stop is passed on once, and a
    second one once more. Whatever ends the iteration early also ends the processes, SIGKILL of this
    one included.

    Args:
        function: Of a module, so that another process finds it; items and results can be pickled.
        items: Its arguments.
        jobs: Number of processes.

    Yields:
        (index of the item, result), as they are finished.

    Raises:
        RuntimeError: A process died; what it had to say is on standard error.
        SystemExit: A signal stopped this process, or the function ended its own.
        Exception: What the function raised.
    """
    share = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(share,)
    )
    signum = signal.SIGTERM
    with exit_on_stop():
        try:
            tasks = {pool.submit(_apply, function, item): k for k, item in enumerate(items)}
            for task in as_completed(tasks):
                yield tasks[task], task.result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a process died; its last words are above. If memory is short, fewer --jobs need "
                "less; the same command goes on."
            ) from None
        except StopSignal as stopped:
            signum = stopped.signum
            raise
        finally:
            _end(pool, signum)


def _end(pool: ProcessPoolExecutor, signum: int) -> None:
    """Waits for the processes, which a signal asks to stop if they still work."""
    for process in multiprocessing.active_children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid or 0, signum)
    try:
        pool.shutdown(cancel_futures=True)
    except StopSignal as again:  # the user will not wait for what they do on the first one
        _end(pool, again.signum)


def _begin(share: int | None) -> None:
    """Prepares a process before it imports anything large."""
    # Of a group of its own, it gets a Ctrl-C once, from its parent, and not twice.
    os.setpgid(0, 0)
    # Before and after training a signal ends it at once; Python would go on with the next item.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if share is not None:
        os.environ["NPROC"] = str(share)  # threads of XLA's pool on a CPU
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _apply(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except (Interrupted, StopSignal) as stopped:  # another item may wait already
        os._exit(128 + stopped.signum)


def _end_with_parent() -> None:
    """Ends this process when its parent is gone: what it works on may be started anew by then."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
