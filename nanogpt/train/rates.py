"""Published rates of devices: arithmetic, memory, links."""

from typing import NamedTuple


class Rates(NamedTuple):
    """Published peaks of one device.

    Attributes:
      full: FLOP/s of float32 products at full precision: statistics and application.
      first: Of the first products of a root.
      rest: Of the others.
      bfloat16: Of the forward and backward pass.
      plain: Of float32 products whose precision is left to the platform.
      memory: Bytes per second of the device's memory.
      near: Bytes per second and direction to devices of one node or pod.
      far: Likewise beyond it.
      node: Devices of a node or pod.
      source: Where the figures come from, and which could not be confirmed.
    """

    full: float
    first: float
    rest: float
    bfloat16: float
    plain: float
    memory: float
    near: float
    far: float
    node: int
    source: str


def gpu(
    float32: float,
    tf32: float,
    bfloat16: float,
    memory: float,
    near: float,
    far: float,
    source: str,
) -> Rates:
    """Roots begin with three bfloat16 products for one, and go on in TF32, also the default."""
    return Rates(float32, bfloat16 / 3, tf32, bfloat16, tf32, memory, near, far, 8, source)


def tpu(bfloat16: float, memory: float, near: float, far: float, pod: int, source: str) -> Rates:
    """Full precision is six bfloat16 products for one; roots go on with three; default is one."""
    six, three = bfloat16 / 6, bfloat16 / 3
    return Rates(six, six, three, bfloat16, bfloat16, memory, near, far, pod, source)


_HOPPER = (
    "FLOP/s, memory and NVLink (900 GB/s both ways): glennklockwood.com/garden/processors/h100, "
    "which quotes NVIDIA; a 400 Gb/s adapter a GPU: docs.nvidia.com/dgx-basepod, core components"
)
DEVICES = {
    "H100 SXM": gpu(66.9e12, 494.7e12, 989.4e12, 3.35e12, 450e9, 50e9, _HOPPER),
    "H200 SXM": gpu(
        *(66.9e12, 494.7e12, 989.4e12, 4.8e12, 450e9, 50e9),
        _HOPPER + "; memory: aiwiki.ai/wiki/nvidia_h200",
    ),
    "A100 SXM 80 GB": gpu(
        *(19.5e12, 156e12, 312e12, 2.039e12, 300e9, 25e9),
        "glennklockwood.com/garden/processors/A100, which quotes NVIDIA's data sheet; 200 Gb/s "
        "adapters: a news report of 2020 on the DGX A100, not confirmed by a page of NVIDIA's",
    ),
    "B200 SXM": gpu(
        *(74.5e12, 1125e12, 2250e12, 7.67e12, 900e9, 50e9),
        "bfloat16: NVIDIA's data sheet 3384703, TF32 half of it; float32 and memory: cores, units, "
        "clock and bandwidth of openxla/xla's target file; NVLink 1800 GB/s both ways and 400 Gb/s "
        "adapters not confirmed by a page of NVIDIA's",
    ),
    "TPU v4": tpu(
        *(275e12, 1200e9, 269e9, 6.25e9, 4096),
        "docs.cloud.google.com/tpu/docs/v4: 1.1 PB/s of all-reduce in a pod of 4096; beyond a pod "
        "not found, v5p's",
    ),
    "TPU v5p": tpu(
        *(459e12, 2765e9, 600e9, 6.25e9, 8960),
        "docs.cloud.google.com/tpu/docs/v5p: 1200 GB/s both ways within a pod, 50 Gb/s beyond",
    ),
    "TPU v5e": tpu(
        *(197e12, 819e9, 200e9, 3.1e9, 256),
        "docs.cloud.google.com/tpu/docs/v5e: 400 GB/s both ways; beyond a pod 6.4 Tb/s for 256",
    ),
    "TPU v6e": tpu(
        *(918e12, 1638e9, 400e9, 3.1e9, 256),
        "docs.cloud.google.com/tpu/docs/v6e: 800 GB/s both ways; beyond a pod not found, v5e's",
    ),
}
