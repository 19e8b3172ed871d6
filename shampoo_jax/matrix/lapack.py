"""`eigh` of a stack on every core of a CPU: SciPy's LAPACK in threads, one matrix each.

XLA's own call takes the matrices of a stack one after another, see `batching.map_matrices`. It is
to the same routine, so results are equal to the bit, whatever the number of threads.
"""

import collections
import concurrent.futures
import contextlib
import ctypes
import functools
import importlib
import os
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from shampoo_jax.matrix import foreign

Array = jax.Array
Work = Callable[[int], None]  # on the matrix at one place of a stack

TARGET = "shampoo_jax_eigh"
# No SciPy, or one with another LAPACK, table or OpenBLAS; a jaxlib with another interface.
UNAVAILABLE = (ImportError, OSError, LookupError, AttributeError, StopIteration, RuntimeError)
ROUTINES = {"float32": "ssyevd", "float64": "dsyevd"}
# OpenBLAS as SciPy's wheels name its functions, and as it does itself.
THREADS = ("scipy_openblas_{}_num_threads", "openblas_{}_num_threads")


class Team:
    """The threads of a process: one a core, shared by all devices and programs."""

    def __init__(self) -> None:
        affinity = getattr(os, "sched_getaffinity", None)  # not every system has it
        self.cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        self.free = threading.Semaphore(self.cores)
        self.pool = concurrent.futures.ThreadPoolExecutor(self.cores, TARGET)

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


def _eigh(
    routine: Callable[..., None], matrices: np.ndarray, vectors: np.ndarray, values: np.ndarray
) -> Work:
    """Decomposes single matrices of a stack; eigenvectors become rows, NaN where LAPACK fails."""
    n, dtype = matrices.shape[-1], matrices.dtype
    # As large as LAPACK's manual asks for with eigenvectors.
    work, iwork = np.empty(1 + 6 * n + 2 * n * n, dtype), np.empty(3 + 5 * n, np.int32)
    order, size, isize, info = np.array([[n], [work.size], [iwork.size], [0]], np.int32)

    def one(place: int) -> None:
        vectors[place] = matrices[place]
        given = order, vectors[place], order, values[place], work, size, iwork, isize, info
        routine(b"V", b"L", *(array.ctypes.data for array in given))
        if info[0]:
            vectors[place] = values[place] = np.nan

    return one


def _routine(module: Any, name: str) -> Callable[..., None]:
    """A function of LAPACK by the table of `scipy.linalg.cython_lapack`.

    A call of it lets go of the interpreter's lock.
    """
    capsule, api = module.__pyx_capi__[name], ctypes.pythonapi
    kinds = ctypes.py_object, ctypes.c_char_p
    name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, kinds[0])(("PyCapsule_GetName", api))
    address = ctypes.PYFUNCTYPE(ctypes.c_void_p, *kinds)(("PyCapsule_GetPointer", api))
    arguments = [ctypes.c_char_p] * 2 + [ctypes.c_void_p] * 9
    return ctypes.CFUNCTYPE(None, *arguments)(address(capsule, name_of(capsule)))


@functools.cache
def available() -> bool:
    """Makes the target known to XLA, where SciPy's LAPACK and OpenBLAS's thread count are found."""
    try:
        module = importlib.import_module("scipy.linalg.cython_lapack")
        one_thread = OneThread(ctypes.CDLL(module.__file__))
        routines = {dtype: _routine(module, name) for dtype, name in ROUTINES.items()}
        foreign.register(TARGET, functools.partial(_decompose, Team(), one_thread, routines))
    except UNAVAILABLE:  # XLA's own call then serves
        return False
    return True


def serves(dtype: Any) -> bool:
    """Whether `eigh` takes this dtype here."""
    return np.dtype(dtype).name in ROUTINES and available()


def _decompose(
    team: Team,
    one_thread: OneThread,
    routines: dict[str, Callable[..., None]],
    arguments: list[np.ndarray],
    results: list[np.ndarray],
) -> None:
    """What XLA calls: matrices in; eigenvectors, as rows, and eigenvalues out."""
    (matrices,), (vectors, values) = arguments, results
    n = values.shape[-1]
    stacks = matrices.reshape(-1, n, n), vectors.reshape(-1, n, n), values.reshape(-1, n)
    with one_thread:
        team.run(len(stacks[2]), functools.partial(_eigh, routines[values.dtype.name], *stacks))


def eigh(matrices: Array) -> tuple[Array, Array]:
    """Eigendecomposition of a stack in a program that is lowered for CPU.

    Args:
      matrices: `[..., d, d]`, of a dtype that `serves`; only the symmetric part is read.

    Returns:
      Eigenvectors `[..., d, d]` in columns and eigenvalues `[..., d]` in ascending order.
    """
    symmetric = (matrices + matrices.swapaxes(-1, -2)) / 2
    of_values = jax.eval_shape(lambda x: x[..., 0], symmetric)
    kinds = jax.typeof(symmetric), of_values
    aliases = {0: 0}  # decomposed in place
    call = jax.ffi.ffi_call(
        TARGET, kinds, vmap_method="broadcast_all", input_output_aliases=aliases
    )
    rows, values = call(symmetric)
    return rows.swapaxes(-1, -2), values
