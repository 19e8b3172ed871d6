"""What devices can do at most, and which share of it a run uses."""

import re

import jax

from nanogpt.config.run import Config
from nanogpt.optimizers.flops import model_flops

# Dense bfloat16 operations a second of a device, by a pattern of all of jax's device_kind: a part
# of a device (MIG), a laptop's or another product of a similar name has other rates, or none here.
# NVIDIA's data sheets print twice these numbers, "with sparsity". Google's pages are
# cloud.google.com/tpu/docs/v3 and so on, "Peak compute per chip (bf16)"; jax's own figures
# for Pallas agree from v4 on.
PEAKS = {
    # A100 data sheet, 1758950-r4: SXM and PCIe alike.
    r"NVIDIA A100(-SXM4-\d+GB|-PCIE-\d+GB| \d+GB PCIe)": 312e12,
    # H100 data sheet: SXM 1,979, PCIe 1,513, NVL 1,671 with sparsity; Hopper architecture paper.
    r"NVIDIA H100 \d+GB HBM3": 989.4e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA H100 NVL": 835.5e12,
    # H200 data sheet: 1,979 with sparsity.
    r"NVIDIA H200": 989.4e12,
    # Blackwell data sheet 3384703.
    r"NVIDIA B200": 2250e12,
    # L4 and L40S data sheets: 242 and 733 with sparsity; L40S 362.05 without.
    r"NVIDIA L4": 121e12,
    r"NVIDIA L40S": 362.05e12,
    # NVIDIA's Ada architecture paper, bfloat16 accumulated in float32.
    r"NVIDIA GeForce RTX 4090": 165.2e12,
    r"TPU v3": 61.5e12,  # 123 a chip, which is two devices of jax's
    r"TPU v4": 275e12,
    r"TPU v5 lite|TPU v5e": 197e12,
    r"TPU v5p?": 459e12,
    r"TPU v6 lite|TPU v6e": 918e12,
}


def check_attention(config: Config) -> None:
    """Raises ValueError where the model asks for cuDNN and this process has no NVIDIA GPU."""
    platform = jax.local_devices()[0].platform
    if config.model.attention == "cudnn" and platform != "gpu":
        raise ValueError(
            f"model.attention=cudnn needs an NVIDIA GPU, this process has {platform}: "
            "use auto, which is cuDNN's on such a GPU, or xla."
        )


def peak_rate(kind: str) -> float | None:
    """Returns the operations a second of one device, None where they are not known.

    >>> peak_rate("NVIDIA H100 80GB HBM3") / 1e12, peak_rate("cpu")
    (989.4, None)
    """
    return next((rate for known, rate in PEAKS.items() if re.fullmatch(known, kind)), None)


def seconds_at_peak(config: Config, kind: str, devices: int) -> float | None:
    """Returns the seconds of a step at the peak rate; over the true seconds it is the MFU.

    Operations of the forward and backward pass, see `model_flops`, not the optimizer's own and not
    those that `model.remat` repeats.

    Args:
        config: the run.
        kind: jax's device_kind.
        devices: how many share a step.

    Returns:
        None for a device whose peak is not known, and for a model in float32.
    """
    peak = peak_rate(kind)
    if peak is None or config.model.dtype != "bfloat16":
        return None
    tokens = config.data.batch_rows * config.model.sequence_length
    return model_flops(config.model, tokens) / (peak * devices)
