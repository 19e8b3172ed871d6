"""The text of docs/scaling.md."""

from collections.abc import Iterable, Mapping
from typing import Any

Found = Mapping[str, Mapping[int, Mapping[str, float]]]  # by model and number of devices

PAGE = """# Shampoo at scale: a model, not a measurement

Written by `python -m scripts.maintenance.scaling_model --validate --plot`. Blocks of at most 1024,
float32, roots by products every 10 steps (times are averages over steps), every device an owner.
FLOPs, bytes and blocks are counted; seconds divide them by {efficiency:g} of the published peak
rates. Nothing here ran on a GPU or TPU.

![Time per optimizer step by number of devices, and the share of its parts](scaling.png)

* **Statistics** are two products of bfloat16 numbers each, **application** counts at the TF32 rate
  (TPU: a third of bfloat16), see [hardware.md](hardware.md#precision-of-large-products). The first
  ten of a root's 27 products count at a third of the bfloat16 rate (TPU: a sixth), the others at
  the TF32 rate (TPU: a third of bfloat16); where moving their matrices takes longer, that counts.
* **State** is read and written once a step.
* **Communication** is what `explain` plans, over the slower link as soon as there is more than a
  node (GPU) or a pod (TPU). Rows of the 8B and the 70B model are split over up to 64 devices; the
  smaller models are replicated, so that whole float32 updates are gathered.
* **Forward and backward** is 6 FLOPs a parameter and token, in bfloat16, at {tokens}.
* **Memory** is state, float32 parameters and gradients, and a temporary copy; no activations.
* An **optimizer step** is the sum of its five parts: nothing overlaps. Compilers let little of the
  communication overlap with products, see [hardware.md](hardware.md#how-to-read-a-plan).
* Latencies, the reduction of gradients and what is done where roots fail are left out.

## Models

{models}

## Rates of one device

{rates}

## Predictions

{predictions}

Where a compiler was asked (below), statistics, roots and communication are its figures; the
others are the model's.

## What follows

* Within a node the optimizer takes a few percent of the forward and backward pass of these batches,
  most of it in float32 products; roots are the smaller part.
* Beyond a node of GPUs communication is nearly all of it. Where parameters are replicated, whole
  updates are gathered whatever the number of devices; rows split over devices, bfloat16
  (`communication_dtype`) or a group of owners within a node cut that.
* A stack of fewer blocks than owners is gathered with the zero blocks that fill it, so its bytes
  grow with the owners (124M from 64 devices on, 1B from 4096): there a group of owners is better.
* The AdamW state of an embedding none of whose dimensions is a multiple of the owners stays whole
  on every device (124M from 512 devices on, 1B at 4096): the state per device jumps.

## Load of the owners

Work of the busiest owner in a refresh, as a multiple of the mean. *Padded*: stacks are filled with
zero blocks to a multiple of the owners, and every block is computed. *Bound*: no placement of whole
blocks is better. Fewer owners, a group of mesh axes, are the remedy where it matters.

{balances}

A bound above 1 means fewer blocks than owners: only smaller blocks, or a group of owners that is
replicated over the other devices, helps there.

## Against the compilers of GPUs and TPUs

The update of 124M parameters in track 3's run, compiled without devices (docs/hardware.jsonl, rows
of polynomial roots with blocks of 1024), of one device: what a step has more than its forward and
backward pass, or the update alone. Each entry is predicted / compiled.

{compiled}

* On 8 devices an owner has stacks of 9 blocks, which go through the optimizer in two chunks of 5:
  one block is computed twice. The model counts every block once.
* Programs hold what is done where roots fail as well. On GPUs that is left out; on TPUs it cannot
  be told apart, so their roots stay the model's.
* Bytes leave a device in a ring of all. The model's run gathers float32 updates of parameters that
  are whole on every device; track 3's also sends blocks of gradients to their owners, and its
  embedding travels in bfloat16.

## Against compiled programs

XLA's analysis of the update compiled for 1, 2, 4 and 8 devices made of one CPU, not executed: the
hidden matrices of a GPT-2 of {layers} layers and width {width}, replicated; jax {jax} on an x86-64
VM of 2 cores. Each entry is predicted / compiled, of one device.

{validation}

* FLOPs agree within 10 %: the model counts products alone, XLA also counts additions,
  scaling and the residual checks of the roots, whose share falls with the size of the matrices.
* The program is the one of an accelerator, where all roots of a stack are computed at once. On CPU
  they are computed in a loop, of which XLA counts one turn. The fallback by eigh, a custom call,
  is never counted.
* Gathered bytes and state agree exactly.
* Temporary memory is a copy of the gradients and six matrices for each root of the largest batch;
  the compiler keeps more alive where there are several shapes, and less where a stack is short.
* Bytes accessed are those of state and of root products. XLA on CPU also writes what lies between
  products; a compiler that fuses more would write less.
"""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _predictions(found: Found) -> str:
    parts = ("statistics", "apply", "roots", "state", "communication", "model")
    rows = []
    for model, by_count in found.items():
        for n, p in by_count.items():
            if n not in (1, 8, 64, 512, 4096):
                continue
            times = [f"{1e3 * p[part]:.3g}" for part in parts]
            step = sum(p[part] for part in parts if part != "model")
            times += [f"{1e3 * step:.3g}", f"{step / p['model']:.2g}"]
            sizes = [f"{p[k] / 1e9:.3g}" for k in ("state_bytes", "memory")]
            rows.append([model, str(n), *times, *sizes, f"{p['padding']:.0%}"])
    return table(
        [
            *("model", "devices", "statistics, ms", "application, ms", "roots, ms", "state, ms"),
            *("communication, ms", "forward and backward, ms", "optimizer step, ms"),
            *("of forward and backward", "state, GB", "memory, GB"),
            "roots of zero blocks",
        ],
        rows,
    )


def _balances(balances: Found) -> str:
    rows = [
        [model, str(n), *(f"{b[k]:.2f}" for k in ("padded", "bound"))]
        for model, by_count in balances.items()
        for n, b in by_count.items()
    ]
    return table(["model", "owners", "padded", "bound"], rows)


def _validation(record: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    parts = list(next(iter(record.values())))
    rows = []
    for part in parts:
        pairs = [each[part] for each in record.values()]
        cells = [f"{a:.4g} / {b:.4g}" + (f" = {a / b:.2f}" if b else "") for a, b in pairs]
        rows.append([part, *cells])
    return table(["part", *(f"{n} devices" if n != "1" else "1 device" for n in record)], rows)


def _compiled(pairs: Mapping[tuple[str, int], tuple[Mapping[str, float], ...]]) -> str:
    def cell(key: str, unit: float, predicted: Mapping[str, float], known: Mapping[str, float]):
        if key not in known:
            return ""
        ratio = f" = {predicted[key] / known[key]:.2f}" if known[key] else ""
        return f"{predicted[key] / unit:,.4g} / {known[key] / unit:,.4g}{ratio}"

    parts = {"statistics": 1e9, "others": 1e9, "bytes": 1e6}
    rows = [
        [device, str(n), *(cell(key, unit, *pair) for key, unit in parts.items())]
        for (device, n), pair in pairs.items()
    ]
    heads = ("statistics, GFLOP", "application and a refresh, GFLOP", "sent, MB")
    return table(["device", "devices", *heads], rows)


def page(
    found: Mapping[str, Found],
    balances: Found,
    record: Mapping[str, Any],
    devices: Mapping[str, Any],
    models: Mapping[str, Any],
    efficiency: float,
    pairs: Mapping[tuple[str, int], tuple[Mapping[str, float], ...]],
) -> str:
    """The page.

    Args:
      found: Of `predict`, by device, model and number of devices.
      balances: Of `balance`, by model and number of owners.
      record: Of `validate`.
      devices: `Rates` by name.
      models: `Model` by name.
      efficiency: Assumed share of peak.
      pairs: Predicted and compiled, by device and their number.
    """
    rates = table(
        [
            *("device", "float32", "first of a root", "rest", "bfloat16, TFLOP/s"),
            *("memory", "near", "far, GB/s", "near means", "source"),
        ],
        [
            [
                name,
                *(f"{x / 1e12:.4g}" for x in (r.full, r.first, r.rest, r.bfloat16)),
                *(f"{x / 1e9:g}" for x in (r.memory, r.near, r.far)),
                f"up to {r.node}",
                r.source,
            ]
            for name, r in devices.items()
        ],
    )
    sizes = table(
        ["model", "layers", "width", "hidden", "keys", "feed-forward", "vocabulary", "source"],
        [
            [
                name,
                *(str(x) for x in (m.layers, m.width, m.hidden, m.keys)),
                "gated" if m.gated else "two matrices",
                f"{m.vocabulary}{', tied' if m.tied else ''}",
                m.source,
            ]
            for name, m in models.items()
        ],
    )
    tokens = ", ".join(f"{m.tokens / 2**20:g} Mi tokens a step ({n})" for n, m in models.items())
    return PAGE.format(
        efficiency=efficiency,
        tokens=tokens,
        models=sizes,
        rates=rates,
        predictions="\n\n".join(f"### {d}\n\n{_predictions(f)}" for d, f in found.items()),
        balances=_balances(balances),
        validation=_validation(record["devices"]),
        compiled=_compiled(pairs),
        **{k: record[k] for k in ("jax", "layers", "width")},
    )
