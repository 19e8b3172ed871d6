"""What devices can do at most, and which share of it a run uses."""

from nanogpt.config.run import Config
from nanogpt.optimizers.flops import model_flops

# Dense bfloat16 operations a second of one device, by a part of jax's device_kind; the longest that
# matches counts. NVIDIA: data sheets of the products, whose numbers with sparsity are twice these.
# TPU: "System architecture" of each version in Google's Cloud TPU documentation, per chip.
PEAKS = {
    "V100": 125e12,  # float16: it has no bfloat16
    "A100": 312e12,
    "A10G": 70e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,  # Ada architecture white paper, accumulated in float32
    "H100": 989.4e12,  # SXM
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
    "TPU v3": 123e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,
}


def peak_rate(kind: str) -> float | None:
    """Returns the operations a second of one device, None where they are not known.

    >>> peak_rate("NVIDIA H100 80GB HBM3") / 1e12, peak_rate("cpu")
    (989.4, None)
    """
    return PEAKS.get(max((name for name in PEAKS if name in kind), key=len, default=""))


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
