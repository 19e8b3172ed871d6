"""What compilers found of the model's cells, from docs/hardware.jsonl."""

import pathlib
from collections.abc import Mapping
from typing import Any

from nanogpt.train.predicted import rate, sent
from nanogpt.train.rates import DEVICES, Rates
from scripts.maintenance.hardware_page import of_optimizer, read_rows

# The rows that are the model's optimizer, but for a refresh at every step, by what it calls them.
METHOD, SIZE, MODEL = "Shampoo, polynomial", "124M", "GPT-2 124M"
KINDS = {"H100 SXM": "h100", "A100 SXM 80 GB": "a100", "TPU v5p": "v5p", "TPU v5e": "v5e"}

Cell = Mapping[str, float]


def cells(path: pathlib.Path) -> dict[str, dict[int, Cell]]:
    """By device and number of devices what the compiler's program of one device holds.

    Args:
      path: docs/hardware.jsonl.

    Returns:
      FLOPs of `statistics`, the optimizer's only products of plain bfloat16 numbers, and of the
      `others`, application and one refresh of the roots; seconds of these at published rates;
      `bytes` that leave the device in rings. A program holds what is done where roots fail, and of
      branches the dearest counts: on GPUs these are the products in full float32, but for thin
      probes, and do not count here; on TPUs they cannot be told apart, so there are no others.
    """
    found: dict[str, dict[int, Cell]] = {}
    names = {kind: device for device, kind in KINDS.items()}
    for row in read_rows(path).values():
        kind = row["target"].partition(":")[0]
        whole = row["words"] in ([], ["--programs", "update"])
        if (row["method"], row["size"]) == (METHOD, SIZE) and whole and kind in names:
            if "failed" not in row and of_optimizer(row)["flops"]:
                device = names[kind]
                found.setdefault(device, {})[row["devices"]] = _cell(row, DEVICES[device])
    return found


def _cell(row: Mapping[str, Any], rates: Rates) -> Cell:
    program = of_optimizer(row)
    others = {k: n for k, n in program["flops"].items() if k not in ("bf16", "f32 highest")}
    moved = {kind: (0, int(size)) for kind, size in program["bytes"].items()}
    cell = {
        "statistics": program["flops"].get("bf16", 0.0),
        "bytes": sent(moved, row["devices"]),
    }
    if row["target"].startswith("v"):
        return cell
    seconds = sum(n / rate(kind, rates) for kind, n in others.items())
    return cell | {"others": sum(others.values()), "seconds": seconds}
