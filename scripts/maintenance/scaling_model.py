"""Predicts what Shampoo costs at scale.

    python -m scripts.maintenance.scaling_model [--validate] [--plot]

A model, not a measurement: FLOPs, bytes and blocks are counted from shapes, by `explain`, and are
divided by published peak rates times an assumed efficiency. Writes docs/scaling.md; `--validate`
first compares the counts with compiled programs (docs/scaling.json), `--plot` draws
docs/scaling.png.
"""

import argparse
import collections
import functools
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

if __name__ == "__main__":
    # Nothing is executed, so the machine code need not be good.
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    )
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import matplotlib
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure

from nanogpt.report.plotting import COLOURS, DASHES, GREY, STYLE
from nanogpt.train.rates import DEVICES, Rates
from scripts.maintenance import scaling_compiled, scaling_page
from scripts.maintenance.scaling_compiled import Cell
from scripts.maintenance.scaling_validation import block_flops, bytes_per_flop, validate
from shampoo_jax import Blocking, Report, batch_axes, explain, shampoo

DOCS = pathlib.Path(__file__).parents[2] / "docs"
EFFICIENCY = 0.4  # of peak, assumed for products and for links alike
EVERY = 10  # steps between refreshes of the roots
COUNTS = (1, 2, 8, 16, 64, 256, 512, 1024, 4096)
# Of the 27 products of a root of edge 512 to 1024, those of the bound and of the first two steps
# are the ones that `PrecisionPolicy.first` computes.
FIRST_SHARE = 10 / 27


class Model(NamedTuple):
    """A decoder and the batch it is trained with.

    Attributes:
      layers: Number of them.
      width: Of the residual stream.
      hidden: Of the feed-forward layer.
      keys: Of keys and values, all heads together.
      gated: Whether the feed-forward layer has a third matrix.
      vocabulary: Rows of the embedding.
      tied: Whether the head is the embedding.
      tokens: A step, chosen here.
      fsdp: Most devices that rows of parameters are split over, chosen here.
      source: Of the sizes.
    """

    layers: int
    width: int
    hidden: int
    keys: int
    gated: bool
    vocabulary: int
    tied: bool
    tokens: int
    fsdp: int
    source: str


MODELS = {
    "GPT-2 124M": Model(
        *(12, 768, 3072, 768, False, 50304, False, 2**19, 1),
        "nanogpt.config.presets, track 3: 162M with its head, which is not the embedding",
    ),
    "Llama 3.2 1B": Model(
        *(16, 2048, 8192, 512, True, 128256, True, 2**21, 1),
        "config of meta-llama/Llama-3.2-1B as copied in kevinstephano/thunder_model_blocks",
    ),
    "Llama 3.1 8B": Model(
        *(32, 4096, 14336, 1024, True, 128256, False, 2**22, 64),
        "tables of the Llama 3.1 configs of oumi",
    ),
    "Llama 3.1 70B": Model(
        *(80, 8192, 28672, 1024, True, 128256, False, 2**24, 64),
        "tables of the Llama 3.1 configs of oumi",
    ),
}
STACKED = batch_axes(dict.fromkeys(("q", "k", "v", "o", "up", "gate", "down"), 0))
OPTIMIZER = shampoo(
    1.0, solver="polynomial", every=EVERY, blocking=Blocking(1024, dimension_numbers=STACKED)
)


def shapes(model: Model) -> dict[str, Any]:
    """Parameters of a decoder: hidden matrices with layers along axis 0, embedding, head, norms."""
    width, layers = model.width, model.layers
    sizes = {
        **{"q": (width, width), "k": (width, model.keys), "v": (width, model.keys)},
        **{"o": (width, width), "up": (width, model.hidden), "down": (model.hidden, width)},
        **({"gate": (width, model.hidden)} if model.gated else {}),
    }
    stacks = {n: (layers, *s) for n, s in sizes.items()}
    ends = {"embed": (model.vocabulary, width), "norms": ((2 * layers + 1) * width,)}
    ends |= {} if model.tied else {"head": (model.vocabulary, width)}
    return {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in (stacks | ends).items()}


def split_rows(path: Any, leaf: Any) -> P:
    """Rows over `fsdp`, not the layers before them."""
    del path
    return P("fsdp") if leaf.ndim == 1 else P(*(None,) * (leaf.ndim - 2), "fsdp")


@functools.cache
def report(model: Model, devices: int) -> Report:
    """`explain` for every device an owner, parameters split over at most `model.fsdp` of them."""
    rows = math.gcd(devices, model.fsdp)
    return explain(
        shapes(model),
        OPTIMIZER,
        mesh={"data": devices // rows, "fsdp": rows},
        parameter_spec=split_rows,
    )


def predict(
    model: Model, devices: int, rates: Rates, compiled: Cell | None = None
) -> dict[str, float]:
    """Seconds per step and bytes of one device.

    Args:
      model: Whose parameters.
      devices: How many, all of them owners.
      rates: Of one device.
      compiled: What the compiler found, of `scaling_compiled.cells`, where it has: its statistics,
        roots and communication are then those of the result.

    Returns:
      In seconds `statistics`, `apply`, `roots` (averaged over steps; zero blocks included; products
      or the traffic of their matrices, whichever takes longer), `state` (read and written once),
      `communication` and `model` (forward and backward pass, 6 FLOPs a parameter and token). In
      bytes `state_bytes` and `memory`: state, parameters, gradients and a temporary copy of these.
      `padding` as in `explain`.
    """
    there = report(model, devices).on_mesh
    assert there is not None
    local = sum(x.size for x in shapes(model).values()) * 4 / math.gcd(devices, model.fsdp)
    trained = sum(x.size for n, x in shapes(model).items() if n != "embed" or model.tied)
    near = rates.near if devices <= rates.node else rates.far
    root = max(
        FIRST_SHARE / rates.first + (1 - FIRST_SHARE) / rates.rest,
        bytes_per_flop(there.blocks) / rates.memory,
    )
    seconds = {
        # Two products of bfloat16 numbers for one, and what a GPU has TF32 for.
        "statistics": 2 * block_flops(there.blocks) / rates.bfloat16,
        "apply": block_flops(there.blocks) / rates.rest,
        "roots": there.refresh_flops / EVERY * root,
        "state": 2 * there.state_bytes / rates.memory,
        "communication": (there.sent_in + there.sent_out) / near,
        "model": 6 * trained * model.tokens / devices / rates.bfloat16,
    }
    if compiled:
        seconds["statistics"] = compiled["statistics"] / rates.bfloat16
        seconds["communication"] = compiled["bytes"] / near
        if "seconds" in compiled:  # of application and one refresh
            seconds["roots"] = (compiled["seconds"] - seconds["apply"]) / EVERY
    return {part: value / EFFICIENCY for part, value in seconds.items()} | {
        "state_bytes": there.state_bytes,
        "memory": there.state_bytes + 3 * local,
        "padding": there.padding,
    }


def planned(model: Model, devices: int) -> dict[str, float]:
    """What `scaling_compiled.cells` has, as the model counts it."""
    there = report(model, devices).on_mesh
    assert there is not None
    work = block_flops(there.blocks)
    return {
        "statistics": 2 * work,
        "others": work + there.refresh_flops,
        "bytes": there.sent_in + there.sent_out,
    }


def balance(model: Model, owners: int) -> dict[str, float]:
    """Work of the busiest owner in a refresh as multiples of the mean.

    Args:
      model: Whose blocks.
      owners: Number of them.

    Returns:
      `padded`: stacks are filled with zero blocks to a multiple of the owners, which are computed
      like others. `bound`: no placement of whole blocks has less.
    """
    matrices = {n: x for n, x in shapes(model).items() if x.ndim == 3}
    found = explain(matrices, OPTIMIZER, mesh={"data": owners})
    counts: collections.Counter[tuple[int, ...]] = collections.Counter()
    for row in found.rows:
        counts.update(row.blocks)
    costs = {shape: float(sum(d**3 for d in shape)) for shape in counts}
    mean = sum(costs[shape] * n for shape, n in counts.items()) / owners
    padded = sum(cost * -(-counts[shape] // owners) for shape, cost in costs.items())
    return {"padded": padded / mean, "bound": max(mean, *costs.values()) / mean}


PARTS = ("statistics", "apply", "roots", "state", "communication")


def draw(path: pathlib.Path, found: dict[str, dict[int, dict[str, float]]], device: str) -> None:
    """Draws time per optimizer step by devices, and the share of its parts, a column a model.

    Args:
      path: PNG file to write.
      found: Of `predict`, by model and number of devices.
      device: For the title.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15, 7.2), dpi=110, layout="constrained")
        panels = figure.subplots(2, len(found), sharex=True, sharey="row", squeeze=False)
        for (name, by_count), (top, low) in zip(found.items(), panels.T, strict=True):
            counts = list(by_count)
            step = [1e3 * sum(p[k] for k in PARTS) for p in by_count.values()]
            top.plot(counts, step, color=COLOURS[0], linewidth=2.2, label="optimizer step")
            train = [1e3 * p["model"] for p in by_count.values()]
            dashed = {"color": GREY, "linestyle": DASHES[0]}
            top.plot(counts, train, **dashed, label="forward and backward pass")
            shares = [
                [1e3 * p[k] / s for p, s in zip(by_count.values(), step, strict=True)]
                for k in PARTS
            ]
            low.stackplot(counts, shares, labels=PARTS, colors=COLOURS)
            top.set(title=name, xscale="log", yscale="log")
            low.set(xlabel="devices", ylim=(0, 1), xlim=(counts[0], counts[-1]))
            low.set_xscale("log", base=2)
        panels[0, 0].set_ylabel("milliseconds a step")
        panels[1, 0].set_ylabel("share of the optimizer step")
        handles = [panels[k, 0].get_legend_handles_labels() for k in range(2)]
        figure.legend(
            *(sum(each, []) for each in zip(*handles, strict=True)),
            loc="outside upper center",
            ncols=7,
            frameon=False,
            title=f"Predicted for {device}, {EFFICIENCY:.0%} of peak",
        )
        figure.savefig(path)


def main() -> None:
    """Writes the page, and what it is asked for beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--validate", action="store_true", help="compile, compare, scaling.json")
    parser.add_argument("--plot", action="store_true", help="draw scaling.png")
    parser.add_argument("--out", type=pathlib.Path, default=DOCS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    record = args.out / "scaling.json"
    if args.validate:
        record.write_text(json.dumps(validate(), indent=1) + "\n")
    elif not record.exists():
        parser.error(f"{record} does not exist: run once with --validate.")
    compiled = scaling_compiled.cells(args.out / "hardware.jsonl")

    def cell(device: str, model: str, n: int) -> dict[str, float]:
        known = compiled.get(device, {}) if model == scaling_compiled.MODEL else {}
        return predict(MODELS[model], n, DEVICES[device], known.get(n))

    found = {
        device: {m: {n: cell(device, m, n) for n in COUNTS} for m in MODELS}
        for device in ("H100 SXM", "TPU v5p")
    }
    balances = {
        m: {n: balance(model, n) for n in (8, 64, 512, 4096)} for m, model in MODELS.items()
    }
    pairs = {
        (device, n): (planned(MODELS[scaling_compiled.MODEL], n), known)
        for device, cells in compiled.items()
        for n, known in cells.items()
    }
    page = scaling_page.page(
        found, balances, json.loads(record.read_text()), DEVICES, MODELS, EFFICIENCY, pairs
    )
    (args.out / "scaling.md").write_text(page)
    if args.plot:
        draw(args.out / "scaling.png", found["H100 SXM"], "H100 SXM")


if __name__ == "__main__":
    main()
