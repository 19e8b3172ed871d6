"""Python functions that programs on CPU call by name: foreign functions of XLA.

Unlike a program with a callback of jax, one with a foreign function is kept in the compilation
cache. Source of the structures: XLA's `ffi/api/c_api.h`, which jaxlib brings along.
"""

import atexit
import ctypes
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAJOR = 0  # of the interface that has these structures; they may only grow at their end
DTYPES = {11: np.dtype(np.float32), 12: np.dtype(np.float64)}  # XLA_FFI_DataType
INTERNAL = 13  # XLA_FFI_Error_Code

Function = Callable[[list[np.ndarray], list[np.ndarray]], None]


def _structure(name: str, **fields: Any) -> Any:
    """A structure that begins with its size and its extensions, as all of them do."""
    head = {"struct_size": ctypes.c_size_t, "extension": ctypes.c_void_p}
    return type(name, (ctypes.Structure,), {"_fields_": list((head | fields).items())})


_address, _int64, _pointer = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER
_Version = _structure("Version", major=ctypes.c_int, minor=ctypes.c_int)
_Error = _structure("Error", message=ctypes.c_char_p, code=ctypes.c_int)
_make_error = ctypes.CFUNCTYPE(_address, _pointer(_Error))
_Api = _structure("Api", version=_Version, internal=_address, make_error=_make_error)
_Buffer = _structure(
    "Buffer", dtype=ctypes.c_int, data=_address, rank=_int64, dims=_pointer(_int64)
)
_Buffers = _structure("Buffers", size=_int64, types=_address, items=_pointer(_pointer(_Buffer)))
_Call = _structure(
    "Call",
    **{"api": _pointer(_Api), "context": _address, "stage": ctypes.c_int},
    **{"arguments": _Buffers, "results": _Buffers},
)
_handler = ctypes.CFUNCTYPE(_address, _pointer(_Call))


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("version", _Version))


class _Question(ctypes.Structure):
    """The extension of a call by which XLA asks a function for its metadata."""

    _fields_ = (
        *(("struct_size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", _address)),
        ("metadata", _pointer(_Metadata)),
    )


_kept: list[Any] = []  # XLA may call them for as long as the process lives


def register(name: str, function: Function) -> None:
    """Makes a function known to `jax.ffi.ffi_call` on CPU.

    Args:
      name: Of the target. Programs in a compilation cache hold it, so it stands for one behaviour.
      function: Takes the arguments and the results of a call, float32 or float64, and writes the
        results. XLA calls it in several threads at once. What it raises fails the program.

    Raises:
      OSError: jaxlib came without its headers.
      RuntimeError: They have another interface than is known here.
    """
    major, minor = _version()
    if major != MAJOR:
        raise RuntimeError(f"XLA's foreign functions of version {major}, not {MAJOR}.")

    def handle(call: Any) -> int | None:
        if call.contents.extension:
            version = _Question.from_address(call.contents.extension).metadata.contents.version
            version.major, version.minor = major, minor
            return None
        try:
            function(_arrays(call.contents.arguments), _arrays(call.contents.results))
        except BaseException as error:
            message = f"{name}: {type(error).__name__}: {error}".encode()
            made = _Error(ctypes.sizeof(_Error), None, message, INTERNAL)
            return call.contents.api.contents.make_error(ctypes.byref(made))
        return None

    if not _kept:
        atexit.register(_finish_programs, os.getpid())  # before what jax has registered
    _kept.append(_handler(handle))
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(_kept[-1]), platform="cpu")


def _finish_programs(process: int) -> None:
    """Waits for the programs that are under way, whether or not someone has their results.

    When jax ends XLA's threads, it holds the interpreter's lock, so one that comes to a function
    here would never end. XLA begins a program when those given to its device before have ended.
    """
    if os.getpid() == process:  # a fork has none of the threads
        for device in jax.local_devices(backend="cpu"):
            jax.block_until_ready(jax.jit(jnp.negative)(jax.device_put(np.float32(0), device)))


def _version() -> tuple[int, int]:
    """The interface of this jaxlib; it is the one that XLA accepts for certain."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    text = header.read_text(encoding="utf-8")
    major, minor = (re.search(rf"define XLA_FFI_API_{x} (\d+)", text) for x in ("MAJOR", "MINOR"))
    if major is None or minor is None:
        raise RuntimeError(f"{header} does not say its version.")
    return int(major[1]), int(minor[1])


def _arrays(buffers: Any) -> list[np.ndarray]:
    """The buffers of a call as arrays that share their memory."""
    arrays = []
    for i in range(buffers.size):
        buffer = buffers.items[i].contents
        dtype, shape = DTYPES[buffer.dtype], buffer.dims[: buffer.rank]
        memory = ctypes.c_char * (math.prod(shape) * dtype.itemsize)
        flat = np.frombuffer(memoryview(memory.from_address(buffer.data or 0)), dtype)
        arrays.append(flat.reshape(shape))
    return arrays
