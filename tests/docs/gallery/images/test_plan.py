"""The plan of an ImageNet run, for devices that are here: convolutions, exchanges, memory."""

from docs.gallery.images import plan
from docs.gallery.images.recipe import Settings
from shampoo_jax import target_devices


def test_a_step_on_eight_devices():
    settings = Settings(network="tiny", rows=16, size=16, dtype="float32", optimizer="sgd")
    found = plan.compiled(settings, target_devices("cpu:8"))
    assert found["short"] == 0 and found["temporary"] > 0
    # Momentum, as many bytes as parameters, and the count of the schedule's steps.
    assert found["optimizer_state"] > 4 * 10_000
    # Two images a device: the convolutions of a forward pass cost 1.5 MFLOP each, forward and
    # backward three times that, less the gradient of the images.
    convolutions = 16 * 16 * (9 * 3 * 8 + 2 * 9 * 8 * 8) + 8 * 8 * (9 * 8 * 16 + 9 * 16**2 + 8 * 16)
    total = sum(found["flops"].values())
    assert 0.8 * 3 < total / (2 * 2 * convolutions) < 1.2 * 3
    # Gradients, and batch statistics of every normalization.
    assert found["exchanges"]["all-reduce"][0] >= 2
