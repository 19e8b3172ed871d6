"""The share of a device's peak that a run uses."""

import dataclasses

import pytest

from nanogpt.config.presets import preset
from nanogpt.optimizers.flops import model_flops
from nanogpt.train.devices import check_attention, peak_rate, seconds_at_peak


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362.05e12),
        ("TPU v3", 123e12 / 2),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        # Other products, and a part of one.
        ("NVIDIA L40", None),
        ("NVIDIA GB200", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),  # has no bfloat16
        ("cpu", None),
    ],
)
def test_only_the_product_itself_has_a_rate(kind, peak):
    assert peak_rate(kind) == peak


def test_seconds_of_a_step_at_the_peak():
    config = preset("track3", "adamw")
    flops = model_flops(config.model, 512 * 1024)
    assert seconds_at_peak(config, "NVIDIA H200", 8) == pytest.approx(flops / (8 * 989.4e12))
    model = dataclasses.replace(config.model, dtype="float32")
    assert seconds_at_peak(dataclasses.replace(config, model=model), "NVIDIA H200", 8) is None
    assert seconds_at_peak(config, "cpu", 1) is None


def test_cudnn_without_a_gpu_is_refused_before_anything_is_compiled():
    config = preset("cpu", "adamw")
    check_attention(config)
    model = dataclasses.replace(config.model, attention="cudnn")
    with pytest.raises(ValueError, match="attention=cudnn needs an NVIDIA GPU.*cpu: use auto"):
        check_attention(dataclasses.replace(config, model=model))
