"""The tables of docs/hardware.md, made of docs/hardware.jsonl."""

import collections
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.maintenance.scaling_page import table

MARKS = ("<!-- made by scripts.maintenance.hardware_table -->", "<!-- until here -->")
HEAD = (
    *("", "free, GiB", "temporary, GiB", "activations", "more for the optimizer"),
    *("optimizer state, MiB", "products of the optimizer, GFLOP"),
    *("exchanges of a step: number, MB", "beside products, MB", "decompositions"),
    *("predicted, ms", "compiled, s"),
)
DECOMPOSITIONS = ("cusolver", "Eigh", "Qr", "syevd", "geqrf")


def read_rows(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Rows of docs/hardware.jsonl by name.

    Forward and backward pass are those of the row of the same group that has them: they do not
    depend on the optimizer.
    """
    if not path.exists():
        return {}
    rows = list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))
    passes = {group(row): row for row in rows if "gradients" in row.get("programs", {})}
    for row in rows:
        programs, other = row.get("programs", {}), passes.get(group(row))
        if "train" in programs and "gradients" not in programs and other:
            own, shared = programs["train"], other["programs"]["gradients"]
            more = max(own.get("temporary", 0) - shared["temporary"], 0)
            row["temporary"] = other["temporary"] | {"optimizer": more}
            # Compiled once: its seconds are the other row's.
            programs["gradients"] = shared | {"cpu_s": 0.0}
    return {row["row"]: row for row in rows}


def group(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What rows of one table have in common."""
    return (row["target"], row["size"], *row["words"])


def write_tables(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes tables between the marks of the page.

    Args:
      path: The page.
      rows: Of docs/hardware.jsonl.
    """
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    parts = [before.rstrip("\n"), "", MARKS[0], "", tables(rows), "", MARKS[1] + after]
    path.write_text("\n".join(parts), encoding="utf-8")


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for each target, size and choice of words, in the order of the rows."""
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for row in rows:
        groups.setdefault(group(row), []).append([row["method"], *_cells(row)])
    heads = [f"**{t}**, {size}, `{' '.join(words)}`" for t, size, *words in groups]
    pairs = zip(heads, groups.values(), strict=True)
    return "\n\n".join(f"{head.removesuffix(', ``')}\n\n{table(HEAD, c)}" for head, c in pairs)


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "failed" in row:
        return [row["failed"], *[""] * (len(HEAD) - 2)]
    name = next(iter(row["programs"]))  # the step, or the update alone
    program, split = row["programs"][name], row["temporary"]
    if "peak" not in program:
        return [f"-{program['short'] / 2**30:.1f}", *[""] * (len(HEAD) - 2)]
    free = -program["short"] or row["memory"] - program["peak"]
    largest = row.get("largest_microbatch_rows")
    exchanges, beside = program["exchanges"], program["overlapped"]
    return [
        f"{free / 2**30:.1f}" + (f"; {largest} rows fit" if largest else ""),
        f"{program['temporary'] / 2**30:.2f}",
        f"{split['activations'] / 2**30:.2f}" if "activations" in split else "",
        f"{split['optimizer'] / 2**30:.2f}" if "optimizer" in split else "",
        f"{row['optimizer_state'] / 2**20:,.0f}",
        "<br>".join(f"{n / 1e9:,.0f} {kind}" for kind, n in of_optimizer(row)["flops"].items()),
        "<br>".join(f"{n} {kind}, {size / 1e6:,.1f}" for kind, (n, size) in exchanges.items()),
        f"{sum(size for _, size in beside.values()) / 1e6:,.1f}" if exchanges else "",
        str(sum(n for k, n in program["calls"].items() if any(d in k for d in DECOMPOSITIONS))),
        f"{1e3 * program['best_s']:.1f} to {1e3 * program['worst_s']:.0f}",
        f"{sum(p['cpu_s'] for p in row['programs'].values()):.0f}",
    ]


def of_optimizer(row: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Products by arithmetic and bytes of exchanges by kind that the optimizer adds to a step.

    Args:
      row: With the update alone, or with the step and its forward and backward pass; otherwise
        there is nothing.
    """
    programs, nothing = row["programs"], {"flops": {}, "exchanges": {}}
    whole, passes = programs.get("update", nothing), nothing
    if "train" in programs and "gradients" in programs:
        whole, passes = programs["train"], programs["gradients"]
    flops = collections.Counter(whole["flops"])
    flops.subtract(passes["flops"])
    sent = collections.Counter({kind: size for kind, (_, size) in whole["exchanges"].items()})
    sent.subtract({kind: size for kind, (_, size) in passes["exchanges"].items()})
    return {
        name: {kind: float(n) for kind, n in sorted(counts.items()) if n > 0}
        for name, counts in (("flops", flops), ("bytes", sent))
    }
