"""`eigh` and truncated roots on every core of a CPU: SciPy's LAPACK, one matrix a thread.

XLA's own call takes the matrices of a stack one after another, see `batching.map_matrices`. For
`eigh` it is to the same routine, so results are equal to the bit, whatever the number of threads.
"""

import ctypes
import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shampoo_jax.matrix import foreign
from shampoo_jax.matrix.threads import OneThread, Team, Work

Array = jax.Array

EIGH, ROOT = "shampoo_jax_eigh", "shampoo_jax_truncated_root"
# No SciPy, or one with another LAPACK, table or OpenBLAS; a jaxlib with another interface.
UNAVAILABLE = (ImportError, OSError, LookupError, AttributeError, StopIteration, RuntimeError)
LETTERS = {"float32": "s", "float64": "d"}  # which names of routines begin with
# Module and routine, and how many letters and arrays it takes.
ROUTINES = {
    "syevd": ("lapack", 2, 9),
    "sytrd": ("lapack", 1, 9),
    "stedc": ("lapack", 1, 10),
    "ormtr": ("lapack", 3, 10),
    "syrk": ("blas", 2, 8),
}
BLOCK, TABLE = 64, 65 * 64  # of LAPACK: columns at a time at most, and ormtr's own memory


class Routines:
    """The functions of SciPy's LAPACK and BLAS for a dtype, by the tables of its Cython modules.

    A call of one lets go of the interpreter's lock.
    """

    def __init__(self, dtype: Any) -> None:
        for name, (module, letters, arrays) in ROUTINES.items():
            table = importlib.import_module(f"scipy.linalg.cython_{module}").__pyx_capi__
            capsule, api = table[LETTERS[np.dtype(dtype).name] + name], ctypes.pythonapi
            kinds = ctypes.py_object, ctypes.c_char_p
            name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, kinds[0])(("PyCapsule_GetName", api))
            address = ctypes.PYFUNCTYPE(ctypes.c_void_p, *kinds)(("PyCapsule_GetPointer", api))
            taken = [ctypes.c_char_p] * letters + [ctypes.c_void_p] * arrays
            setattr(self, name, ctypes.CFUNCTYPE(None, *taken)(address(capsule, name_of(capsule))))

    def call(self, name: str, letters: bytes, *arrays: np.ndarray) -> None:
        """Calls a routine with one letter each and the addresses of arrays."""
        each = (letters[i : i + 1] for i in range(len(letters)))
        getattr(self, name)(*each, *(array.ctypes.data for array in arrays))


def _eigh(
    routines: Routines, matrices: np.ndarray, vectors: np.ndarray, values: np.ndarray
) -> Work:
    """Decomposes single matrices of a stack; eigenvectors become rows, NaN where LAPACK fails."""
    n, dtype = matrices.shape[-1], matrices.dtype
    # As large as LAPACK's manual asks for with eigenvectors.
    work, iwork = np.empty(1 + 6 * n + 2 * n * n, dtype), np.empty(3 + 5 * n, np.int32)
    order, size, isize, info = _integers(n, work.size, iwork.size, 0)

    def one(place: int) -> None:
        vectors[place] = matrices[place]
        given = order, vectors[place], order, values[place], work, size, iwork, isize, info
        routines.call("syevd", b"VL", *given)
        if info[0]:
            vectors[place] = values[place] = np.nan

    return one


def _truncated_root(
    routines: Routines, matrices: np.ndarray, options: np.ndarray, roots: np.ndarray
) -> Work:
    """Roots of single matrices of a stack, in their upper triangle; NaN where LAPACK fails.

    It is what `syevd` does, but only eigenvectors that are kept are turned back, most of its time
    at full rank, and half of `Q diag(w^-e) Q^T` is computed, as `X X^T`.
    """
    n, dtype = matrices.shape[-1], matrices.dtype
    values, beside, reflected = np.empty((3, n), dtype)
    rows = np.empty((n, n), dtype)  # eigenvectors, which are LAPACK's columns
    work = np.empty(max(1 + 4 * n + n * n, BLOCK * n + TABLE), dtype)
    iwork = np.empty(3 + 5 * n, np.int32)
    order, size, isize, info = _integers(n, work.size, iwork.size, 0)
    whole, nothing = np.ones(1, dtype), np.zeros(1, dtype)

    def one(place: int) -> None:
        root, (exponent, rtol, atol) = roots[place], options[place]
        root[:] = matrices[place]
        given = order, root, order, values, beside, reflected, work, size, info
        routines.call("sytrd", b"L", *given)
        given = order, values, beside, rows, order, work, size, iwork, isize, info
        routines.call("stedc", b"I", *given)
        if info[0]:
            root[:] = np.nan
            return
        cutoff = max(rtol * max(values[-1], 0), atol)
        first = int(np.searchsorted(values, cutoff, side="right"))
        kept, (count,) = rows[first:], _integers(n - first)
        given = order, count, root, order, reflected, kept, order, work, size, info
        routines.call("ormtr", b"LLN", *given)
        kept *= (values[first:] ** (-exponent / 2))[:, None]
        routines.call("syrk", b"LN", order, count, whole, kept, order, nothing, root, order)

    return one


def _integers(*numbers: int) -> np.ndarray:
    """Each as an array of its own, as Fortran takes them."""
    return np.array(numbers, np.int32)[:, None]


@functools.cache
def available() -> bool:
    """Tells XLA of the targets, where SciPy's LAPACK and OpenBLAS's thread count are found."""
    try:
        module = importlib.import_module("scipy.linalg.cython_lapack")
        one_thread = OneThread(ctypes.CDLL(module.__file__))
        routines = {dtype: Routines(dtype) for dtype in LETTERS}
        share = functools.partial(_share_out, Team(), one_thread, routines)
        foreign.register(EIGH, functools.partial(share, _eigh))
        foreign.register(ROOT, functools.partial(share, _truncated_root))
    except UNAVAILABLE:  # XLA's own call then serves
        return False
    return True


def serves(dtype: Any) -> bool:
    """Whether `eigh` and `truncated_root` take this dtype here."""
    return np.dtype(dtype).name in LETTERS and available()


def _share_out(
    team: Team,
    one_thread: OneThread,
    routines: dict[str, Routines],
    make: Callable[..., Work],
    arguments: list[np.ndarray],
    results: list[np.ndarray],
) -> None:
    """What XLA calls: works on stacks of which the first argument is matrices."""
    *stack, _, _ = arguments[0].shape
    flat = [a.reshape(math.prod(stack), *a.shape[len(stack) :]) for a in arguments + results]
    with one_thread:
        team.run(len(flat[0]), functools.partial(make, routines[flat[0].dtype.name], *flat))


def _call(target: str, arguments: Sequence[Array], kinds: Any) -> Any:
    """The target's results in a program; the first is written in the place of the matrices."""
    options = {"vmap_method": "broadcast_all", "input_output_aliases": {0: 0}}
    return jax.ffi.ffi_call(target, kinds, **options)(*arguments)


def _symmetric(matrices: Array) -> Array:
    return (matrices + matrices.swapaxes(-1, -2)) / 2


def eigh(matrices: Array) -> tuple[Array, Array]:
    """Eigendecomposition of a stack in a program that is lowered for CPU.

    Args:
      matrices: `[..., d, d]`, of a dtype that `serves`; only the symmetric part is read.

    Returns:
      Eigenvectors `[..., d, d]` in columns and eigenvalues `[..., d]` in ascending order.
    """
    of_values = jax.eval_shape(lambda x: x[..., 0], matrices)
    rows, values = _call(EIGH, [_symmetric(matrices)], (jax.typeof(matrices), of_values))
    return rows.swapaxes(-1, -2), values


def truncated_root(matrices: Array, exponent: Any, rtol: Any, atol: Any) -> Array:
    """`A^(-exponent)` of a stack, eigenvalues up to `max(rtol * largest, atol)` mapped to 0.

    Args:
      matrices: `[..., d, d]`, finite, of a dtype that `serves`; only the symmetric part is read.
      exponent: Real; like both cutoffs `[]` or `[...]`.
      rtol: Cutoff relative to the largest eigenvalue.
      atol: Absolute cutoff, at least 0.

    Returns:
      The roots `[..., d, d]`, symmetric, of NaN where LAPACK fails.
    """
    each = matrices.shape[:-2]
    options = [jnp.broadcast_to(x, each).astype(matrices.dtype) for x in (exponent, rtol, atol)]
    arguments = _symmetric(matrices), jnp.stack(options, -1)
    upper = _call(ROOT, arguments, jax.typeof(matrices))
    d = matrices.shape[-1]
    return jnp.where(jnp.tri(d, dtype=bool), upper.swapaxes(-1, -2), upper)
