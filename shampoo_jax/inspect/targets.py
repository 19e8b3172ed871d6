"""Hardware that is not here: devices to compile for, which XLA's compilers describe themselves."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from shampoo_jax.base.options import refuse


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices that programs can be compiled for, though nothing can run on them.

    Attributes:
      name: As it was asked for, `"h100:8"`.
      platform: `"cpu"`, `"cuda"` or `"tpu"`, what programs are lowered for.
      devices: All of them, for a mesh.
      memory: Bytes of one; None for a CPU.

    Example:
      >>> import shampoo_jax
      >>> target = shampoo_jax.target_devices("cpu:1")
      >>> target.name, target.platform, len(target.devices), target.memory
      ('cpu:1', 'cpu', 1, None)
    """

    name: str
    platform: str
    devices: tuple[Any, ...]
    memory: int | None


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """What XLA wants to know of a GPU; figures of openxla/xla, backends/gpu/target_config/specs."""

    name: str
    capability: int
    cores: int
    fpus: int
    shared: int  # bytes per core
    block: int  # largest part of it for one block
    cache: int
    ghz: float
    bandwidth: int
    memory: int


_GPUS = {
    "a100": _Gpu(
        *("NVIDIA A100-SXM4-80GB", 8, 108, 64, 167936, 166912),
        *(41943040, 1.41, 2039040000000, 85100068864),
    ),
    "h100": _Gpu(
        *("NVIDIA H100 80GB HBM3", 9, 132, 128, 233472, 232448),
        *(52428800, 1.98, 3352320000000, 84942979072),
    ),
    "h200": _Gpu(
        *("NVIDIA H200 141GB HBM3e", 9, 132, 128, 233472, 232448),
        *(52428800, 1.98, 4800000000000, 151397597184),
    ),
    "b200": _Gpu(
        *("NVIDIA B200", 10, 148, 128, 233472, 232448),
        *(132644864, 1.965, 7672320000000, 191514411008),
    ),
}
# Bytes of a chip: docs.cloud.google.com/tpu/docs, the page of each.
_TPUS = {"v4": 32 << 30, "v5e": 16 << 30, "v5p": 95 << 30, "v6e": 32 << 30}
NODE = 8  # GPUs of one host


def target_devices(name: str) -> Target:
    """The devices of a name, for programs that are compiled and not run.

    XLA's compilers run without the device. Python has to find them when jax is imported: `make
    compilers` puts them into folders of their own for `PYTHONPATH`, `build/compilers/compilers/tpu`
    and `cuda`. Call this before anything else makes jax look for devices: it sets the environment
    variables that keep the compilers from looking for hardware.

    Args:
      name: `KIND:COUNT` with `a100`, `h100`, `h200`, `b200` or `cpu`, the CPU's devices being those
        of this process; `KIND:SHAPE` with `v4`, `v5e`, `v5p` or `v6e`, as in `v5e:2x4`.

    Raises:
      ValueError: Another name.
      RuntimeError: A compiler that is not installed, or of another version than jaxlib, with what
        to do.

    Example:
      >>> import shampoo_jax
      >>> shampoo_jax.target_devices("cpu:1").platform
      'cpu'
    """
    kind, _, size = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", size) or (
        kind not in _TPUS and ("x" in size or kind not in (*_GPUS, "cpu"))
    ):
        kinds = ", ".join((*_GPUS, "cpu"))
        refuse("target", name, f": give {kinds} with a number, as in h100:8, or v5e:2x4")
    if kind == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < int(size):
            raise RuntimeError(
                f"target={name!r}: this process has {len(devices)} CPU devices; set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={size} before jax is imported."
            )
        return Target(name, "cpu", tuple(devices[: int(size)]), None)
    if kind in _TPUS:
        return Target(name, "tpu", _tpu(name, kind, size), _TPUS[kind])
    return Target(name, "cuda", _cuda(name, _GPUS[kind], int(size)), _GPUS[kind].memory)


def _tpu(name: str, kind: str, size: str) -> tuple[Any, ...]:
    _find("tpu", name, ("libtpu",))
    chips = math.prod(int(n) for n in size.split("x"))
    accelerator = {"v5e": f"v5litepod-{chips}", "v6e": f"v6e-{chips}"}
    # Without these libtpu asks the network what machine this is, and locks a device that is not.
    os.environ.update(
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_ACCELERATOR_TYPE=accelerator.get(kind, f"{kind}-{2 * chips}"),  # counted in cores
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_ID="0",
    )
    topology: Any = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{size}")
    return tuple(topology.devices)


def _cuda(name: str, gpu: _Gpu, count: int) -> tuple[Any, ...]:
    plugin = _find("cuda", name, ("jax_cuda13_plugin", "jax_cuda12_plugin"))
    version, wanted = (importlib.metadata.version(p) for p in (plugin, "jaxlib"))
    if version != wanted:
        raise RuntimeError(
            f"target={name!r}: {plugin} is {version} and jaxlib {wanted}, which must be the same "
            "to the last digit: `make compilers` makes an environment where they are."
        )
    if count > NODE and count % NODE:
        raise ValueError(f"target={name!r}: more than {NODE} GPUs come in nodes of {NODE}.")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:  # there is nothing to time kernels on
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
    hosts = -(-count // NODE)
    topology: Any = topologies.get_topology_desc(
        platform="cuda", target_config=_description(gpu), topology=f"1x{hosts}x{count // hosts}"
    )
    return tuple(topology.devices)


def _find(platform: str, name: str, packages: tuple[str, ...]) -> str:
    """The first of these packages that is there."""
    for package in packages:
        if importlib.util.find_spec(package) is not None:
            return package
    raise RuntimeError(
        f"target={name!r} needs the compiler in {packages[0]}, which Python does not find: `make "
        f"compilers` installs it in build/compilers, whose nanogpt plan finds it. Start other "
        f"programs there with PYTHONPATH=build/compilers/compilers/{platform}."
    )


def _description(gpu: _Gpu) -> str:
    """A `GpuTargetConfigProto` as text."""
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: {gpu.shared} threads_per_core_limit: 2048
      core_count: {gpu.cores} fpus_per_core: {gpu.fpus}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.cache} clock_rate_ghz: {gpu.ghz}
      device_memory_size: {gpu.memory} shared_memory_per_block_optin: {gpu.block}
      cuda_compute_capability {{ major: {gpu.capability} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability {gpu.capability}.0"
      device_address_bits: 64 ecc_enabled: true name: "{gpu.name}" driver_version: "13.0.0"
      runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
    runtime_version {{ major: 13 }} device_description_str: "{gpu.name}"
    """
