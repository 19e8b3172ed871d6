"""The plan of an ImageNet run, for devices that are here: convolutions, exchanges, memory."""

from docs.gallery.images import plan
from docs.gallery.images.recipe import Settings
from shampoo_jax import target_devices


def test_a_step_on_eight_devices():
    settings = Settings(network="tiny", rows=16, size=16, dtype="float32", optimizer="sgd")
    found = plan.compiled(settings, target_devices("cpu:8"))
    assert found["short"] == 0 and found["temporary"] > 0
    # Momentum, as many bytes as parameters, and the count of the schedule's steps.
    parameters = 27 * 8 + 2 * 9 * 8 * 8 + 6 * 8 + 8 * 1000 + 1000
    assert found["optimizer_state"] == 4 * (parameters + 1)
    # Two images a device: three times the forward pass, but for the gradient of the images.
    stem, others = 2 * 2 * 16 * 16 * 27 * 8, 2 * 2 * 16 * 16 * 2 * 9 * 8 * 8 + 2 * 2 * 8 * 1000
    assert sum(found["flops"].values()) == 2 * stem + 3 * others
    # Gradients, and batch statistics of every normalization.
    assert found["exchanges"]["all-reduce"][0] >= 2
