"""The threads of a CPU that share a stack among them, and OpenBLAS held at one of its own."""

import collections
import concurrent.futures
import contextlib
import ctypes
import os
import threading
from collections.abc import Callable

Work = Callable[[int], None]  # on the matrix at one place of a stack

NAME = "shampoo_jax"  # of the threads
# OpenBLAS as SciPy's wheels name its functions, and as it does itself.
THREADS = ("scipy_openblas_{}_num_threads", "openblas_{}_num_threads")


class Team:
    """The threads of a process: one a core, shared by all devices and programs."""

    def __init__(self) -> None:
        affinity = getattr(os, "sched_getaffinity", None)  # not every system has it
        self.cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        self.free = threading.Semaphore(self.cores)
        self.pool = concurrent.futures.ThreadPoolExecutor(self.cores, NAME)

    def run(self, count: int, prepare: Callable[[], Work]) -> None:
        """Works on places 0, ..., count - 1; each thread that takes part prepares for itself."""
        places = collections.deque(range(count))

        def take_part() -> None:
            with self.free:
                work = prepare()
                with contextlib.suppress(IndexError):  # no place is left
                    while True:
                        work(places.popleft())

        # This thread takes part as well and waits only for those that have begun. So it needs none
        # of the pool's, which may be busy for another device, and at the end of the interpreter do
        # not begin.
        others: list[concurrent.futures.Future[None]] = []
        with contextlib.suppress(RuntimeError):
            for _ in range(min(count, self.cores) - 1):
                others.append(self.pool.submit(take_part))
        try:
            take_part()
        finally:
            others = [other for other in others if not other.cancel()]
            concurrent.futures.wait(others)
        for other in others:
            other.result()


class OneThread:
    """Where OpenBLAS has no threads of its own, until all who are inside have left."""

    def __init__(self, library: ctypes.CDLL):
        name = next(name for name in THREADS if hasattr(library, name.format("set")))
        self.get, self.set = (getattr(library, name.format(verb)) for verb in ("get", "set"))
        self.lock, self.inside, self.before = threading.Lock(), 0, 1

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = self.get()
                self.set(1)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.set(self.before)
