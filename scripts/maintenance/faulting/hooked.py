"""The command `nanogpt` with an accident in it: `python -m ...hooked ACCIDENT ... -- train ...`.

Accidents that come from outside, signals of a parent and damaged files, need no hook. These happen
at a batch of this process, counted from 0, so that a trial can be repeated:

    stop=B          SIGTERM to itself
    kill=B          SIGKILL to itself
    freeze=B        SIGSTOP to itself
    clock=B:S       from there on the clock of the day is S seconds behind
    limit=B:N       no file grows beyond N bytes, as on a disk that is full
    spoil=B:FILE    the middle of FILE becomes 0xff
    cut=B:FILE      FILE loses its second half
    nan=K,K...      the gradients of these updates are infinite
    refused=B       every file of Python's refuses to be written: ENOSPC

And these at another place:

    save=N          SIGKILL to itself in the save N, when all is written and nothing counts yet
    compile=N       SIGTERM to itself from another thread, when it compiles for the Nth time

Several command lines, parted by "--", run one after another in this process, each with a line
"ended CODE" behind it.
"""

import builtins
import contextlib
import errno
import inspect
import itertools
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from nanogpt import cli
from nanogpt.train import checkpoint, loop
from scripts.maintenance.faulting import bucket


def set_back(seconds: float) -> None:
    """Sets back the clock of the day, and not the one that only goes on, as an administrator."""
    before, before_ns = time.time, time.time_ns
    time.time = lambda: before() - seconds
    time.time_ns = lambda: before_ns() - int(seconds * 1e9)


def limit_files(size: int) -> None:
    """No file grows beyond a size; Python ignores the signal, so writes fail with EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def spoil(path: str) -> None:
    """Overwrites the middle half of a file, as another program or a dying disk does."""
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        file.seek(size // 4)
        file.write(b"\xff" * (size // 2))


def refuse_writes() -> None:
    """Lets every file that Python opens for writing fail as on a full disk."""
    opened = builtins.open

    def full(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if set(mode) & set("wax+"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return opened(file, mode, *rest, **options)

    builtins.open = full


def poison(*updates: int) -> None:
    """Makes the gradients of some updates infinite, before the run's own guard."""
    made = loop.make_train_step

    def make(graphdef: Any, tx: Any, *rest: Any) -> Any:
        def update(gradients: Any, state: Any, params: Any, **extra: Any) -> Any:
            adam = state.inner_state.inner_states["head"].inner_state[0]
            step = adam.count + state.total_notfinite
            wrong = jax.numpy.isin(step, jax.numpy.array(updates))
            gradients = jax.tree.map(lambda g: jax.numpy.where(wrong, jax.numpy.inf, g), gradients)
            return tx.update(gradients, state, params, **extra)

        return made(graphdef, optax.GradientTransformationExtraArgs(tx.init, update), *rest)

    loop.make_train_step = make  # pyrefly: ignore[bad-assignment]


def kill_in_save(number: int) -> None:
    """Kills the process in one of its saves, between the arrays and the digests."""
    saves, written = itertools.count(1), checkpoint.write_digests

    def write(folder: Any) -> None:
        if next(saves) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        written(folder)

    checkpoint.write_digests = write


def stop_in_compile(number: int) -> None:
    """Asks the process to stop while its main thread is about to be inside of XLA."""
    times, compiled = itertools.count(1), loop._compiled

    def compile(*arguments: Any) -> Any:
        if next(times) == number:
            threading.Thread(target=ACCIDENTS["stop"]).start()
        return compiled(*arguments)

    loop._compiled = compile  # pyrefly: ignore[bad-assignment]


ACCIDENTS: dict[str, Callable[..., object]] = {
    "stop": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "clock": lambda seconds: set_back(float(seconds)),
    "limit": lambda size: limit_files(int(size)),
    "spoil": spoil,
    "cut": lambda path: os.truncate(path, os.path.getsize(path) // 2),
    "refused": refuse_writes,
}

# Not at batches; functions of the numbers behind "=".
ELSEWHERE: dict[str, Callable[..., object]] = {
    "nan": poison,
    "save": kill_in_save,
    "compile": stop_in_compile,
}


class Batches:
    """Counts the training batches that the loop sends to its devices, and has accidents there."""

    def __init__(self, accidents: Sequence[str]):
        self.planned: dict[int, list[Callable[[], object]]] = {}
        for accident in accidents:
            name, _, told = accident.partition("=")
            batch, *rest = told.split(":", 1)
            happen = ACCIDENTS[name]
            planned = self.planned.setdefault(int(batch), [])
            planned.append(lambda happen=happen, rest=rest: happen(*rest))
        self.count, self.to_device = 0, loop.to_device

    def __call__(self, batch: Any, layout: Any) -> Any:
        """Stands for `loop.to_device`."""
        # Validation goes through here, too, with rows of a microbatch.
        caller = inspect.currentframe()
        if caller and caller.f_back and caller.f_back.f_code.co_name == "train":
            for happen in self.planned.get(self.count, ()):
                happen()
            self.count += 1
        return self.to_device(batch, layout)


def run(words: Sequence[str], batches: Batches) -> int:
    """Runs one command line; returns the status that its process would end with."""
    batches.count = 0
    try:
        cli.main(words)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def main(arguments: Sequence[str]) -> None:
    """Runs the accidents and command lines of the docstring above."""
    first = arguments.index("--")
    accidents, lines = arguments[:first], [[]]
    for word in arguments[first + 1 :]:
        lines.append([]) if word == "--" else lines[-1].append(word)
    if bucket.FOLDER in os.environ:
        bucket.join()
    at_batches = []
    for accident in accidents:
        name, _, told = accident.partition("=")
        if name in ELSEWHERE:
            ELSEWHERE[name](*map(int, told.split(",")))
        else:
            at_batches.append(accident)
    batches = Batches(at_batches)
    loop.to_device = batches  # pyrefly: ignore[bad-assignment]
    codes = []
    for words in lines:
        codes.append(run(words, batches))
        if len(lines) > 1:
            print(f"ended {codes[-1]}", flush=True)
    with contextlib.suppress(ValueError):
        sys.stdout.flush()
    sys.exit(max(codes))


if __name__ == "__main__":
    main(sys.argv[1:])
