"""Predicts what Shampoo costs at scale: python -m scripts.scaling_model > docs/scaling.md.

A model, not a measurement: FLOPs, bytes and filling are counted by `explain` from shapes, and are
divided by published peak rates times an assumed efficiency.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shampoo_jax import batch_axes, explain


class Rates(NamedTuple):
    """Published peaks of one device.

    Attributes:
      flops: Dense products per second, TF32 on GPUs and bfloat16 on TPUs.
      near: Bytes per second and direction to devices of one node or pod.
      far: Likewise beyond the node.
    """

    flops: float
    near: float
    far: float


# NVIDIA's data sheets of H100 SXM and H200 (half of the figure with sparsity; NVLink 900 GB/s both
# ways; a 400 Gb/s adapter a GPU) and Google Cloud's page of TPU v5p (4800 Gb/s interconnect).
DEVICES = {
    "H100, H200": Rates(495e12, 450e9, 50e9),
    "TPU v5p": Rates(459e12, 300e9, 300e9),
}
EFFICIENCY = 0.4  # of peak, assumed for products and for links alike
NODE = 8
# layers, width, width of the feed-forward layer, width of keys and values
MODELS = {
    "124M": (12, 768, 3072, 768),
    "1B": (16, 2048, 8192, 2048),
    "7B": (32, 4096, 11008, 4096),
    "70B": (80, 8192, 28672, 1024),
}
COUNTS = (1, 8, 64, 512, 4096)
STACKED = batch_axes(dict.fromkeys(("q", "k", "v", "o", "up", "gate", "down"), 0))


NOTE = """The model says: filling passes 10 % once a stack has few blocks an owner (124M from 64
devices, 1B and 7B at 4096), where a group of owners, replicated over the rest, costs less; there
the time of gathering whole float32 updates, not roots, is what matters: rows split over devices or
`communication_dtype`, cut it. Activations, the gradient and overlap are not modelled, nor are
latencies. Gathered bytes and state agree with compiled programs on 8 fake devices, see
[sharding.md](sharding.md).
"""


def shapes(layers: int, width: int, feed_forward: int, keys: int) -> dict[str, Any]:
    """Hidden matrices of a decoder with gated feed-forward layers, layers along axis 0."""
    sizes = {
        **{"q": (width, width), "k": (width, keys), "v": (width, keys), "o": (width, width)},
        **{"up": (width, feed_forward), "gate": (width, feed_forward)},
        "down": (feed_forward, width),
    }
    return {n: jax.ShapeDtypeStruct((layers, *s), jnp.float32) for n, s in sizes.items()}


def predict(params: Any, devices: int, rates: Rates, every: int = 10) -> dict[str, float]:
    """Seconds per step and bytes per device, parameters replicated and every device an owner.

    Args:
      params: From `shapes`.
      devices: How many.
      rates: Of one device.
      every: Steps between refreshes of the roots, which are computed by products.

    Returns:
      `statistics_and_apply`, `roots` (averaged over steps) and `communication` in seconds, `state`
      in bytes, and `filling`, the share of the work on blocks that only fill stacks.
    """
    options = {"solver": "polynomial", "every": every, "dimension_numbers": STACKED}
    report = explain(params, mesh={"data": devices}, **options)
    there = report.on_mesh
    assert there is not None
    speed = rates.flops * EFFICIENCY
    link = (rates.near if devices <= NODE else rates.far) * EFFICIENCY
    products = (report.statistics_flops + report.apply_flops) / devices / (1 - there.padding)
    return {
        "statistics_and_apply": products / speed,
        "roots": there.refresh_flops / every / speed,
        "communication": (there.sent_in + there.sent_out) / link,
        "state": there.state_bytes,
        "filling": there.padding,
    }


def main() -> None:
    """Prints the page."""
    print(
        "# Shampoo at scale: a model, not a measurement\n\n"
        "Written by `python -m scripts.scaling_model`. Blocks of 1024, float32, roots by products "
        "every\n10 steps, parameters replicated, every device an owner. FLOPs, bytes and filling "
        f"are counted;\nseconds divide them by {EFFICIENCY} of the published peak rates.\n"
    )
    for device, rates in DEVICES.items():
        print(
            f"## {device}\n\n| model | devices | statistics and apply, ms | roots, ms |"
            " communication, ms | state per device, GB | filling |\n|---|---|---|---|---|---|---|"
        )
        for model, sizes in MODELS.items():
            for n in COUNTS:
                p = predict(shapes(*sizes), n, rates)
                print(
                    f"| {model} | {n} | {1e3 * p['statistics_and_apply']:.3g} | "
                    f"{1e3 * p['roots']:.3g} | {1e3 * p['communication']:.3g} | "
                    f"{p['state'] / 1e9:.3g} | {p['filling']:.1%} |",
                    flush=True,
                )
        print()
    print(NOTE, end="")


if __name__ == "__main__":
    main()
