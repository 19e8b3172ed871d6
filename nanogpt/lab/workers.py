"""A function on many items, in processes side by side."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any


def in_processes(
    function: Callable[[Any], Any], items: Sequence[Any], jobs: int
) -> Iterator[tuple[int, Any]]:
    """Applies a function to every item, in `jobs` fresh processes that take one after another.

    Every process gets an equal share of the cores, so that they do not take turns on all of them.
    Whatever ends the iteration early also ends the processes, SIGKILL of this one included.

    Args:
        function: Of a module, so that another process finds it; items and results can be pickled.
        items: Its arguments.
        jobs: Number of processes.

    Yields:
        (index of the item, result), as they are finished.

    Raises:
        RuntimeError: A process died; what it had to say is on standard error.
    """
    context = multiprocessing.get_context("spawn")
    share = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"NPROC": share}  # threads of XLA's pool on a CPU
    waiting = iter(enumerate(items))
    started, busy = [], {}
    try:
        for _ in range(min(jobs, len(items))):
            connection, other = context.Pipe()
            process = context.Process(target=_serve, args=(other, function, environment))
            process.start()
            other.close()
            started.append((process, connection))
            busy[connection] = (process, _give(connection, waiting))
        while busy:
            ready = wait(list(busy))
            for connection in [one for one in busy if one in ready]:
                process, index = busy.pop(connection)
                try:
                    result = connection.recv()
                except EOFError:
                    process.join()
                    raise RuntimeError(
                        f"the process of item {index} ended with exit code {process.exitcode}; "
                        "its last words are above."
                    ) from None
                yield index, result
                following = _give(connection, waiting)
                if following is not None:
                    busy[connection] = (process, following)
    finally:
        for process, _ in started:
            process.terminate()
        for process, connection in started:
            process.join()
            connection.close()


def _give(connection: Connection, waiting: Iterator[tuple[int, Any]]) -> int | None:
    """Sends the next item, if there is one, and returns its index."""
    index, item = next(waiting, (None, None))
    if index is not None:
        connection.send(item)
    return index


def _serve(
    connection: Connection, function: Callable[[Any], Any], environment: dict[str, str]
) -> None:
    """Answers items with results until the other side is gone."""
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        connection.send(function(item))


def _end_with_parent() -> None:
    """Ends this process when its parent is gone: what it works on may be started anew by then."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
