"""Compiles the runs of docs/hardware.md for hardware that is not here.

    build/compilers/bin/python -m scripts.maintenance.hardware_table [ROW ...]

Each row is `nanogpt plan` in a process of its own, with a limit on its processor time. What it says
is a line of docs/hardware.jsonl; rows that are there already are left alone, so that it can be
stopped and started; delete a line to have it made again. Then the tables of docs/hardware.md are
written between their marks. `--write` does that alone.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

from scripts.maintenance.hardware_page import group, read_rows, write_tables

COMMAND = [sys.executable, "-m", "nanogpt", "plan", "--json"]
DOCS = pathlib.Path(__file__).parents[2] / "docs"
PRODUCTS = ("--matrices.cutoff", "relative", "--matrices.block-size", "1024", "--matrices.solver")
WHOLE = "Shampoo, polynomial, whole"
# As published for track 3, but for what stands here.
METHODS: dict[str, tuple[str, ...]] = {
    "AdamW": ("adamw",),
    "Muon of Optax": ("muon",),
    "Muon of track 3": ("muon_track3",),
    "Shampoo, eigh": ("shampoo",),
    "Shampoo, polynomial": ("shampoo", *PRODUCTS, "polynomial"),
    WHOLE: ("shampoo", "--matrices.cutoff", "relative", "--matrices.solver", "polynomial"),
    "Shampoo, clip": ("shampoo", *PRODUCTS, "polynomial_clip"),
    "Shampoo, one-sided": ("shampoo", "--matrices.exponent", "smaller"),
    "SOAP": ("soap",),
    "KL-Shampoo": ("kl_shampoo",),
}
MAIN = ("AdamW", "Shampoo, eigh", "Muon of track 3")
SIZES = {
    "124M": (),
    "350M": ("--model.num-layers", "24", "--model.model-dim", "1024", "--model.mlp-dim", "4096"),
    "1.3B": ("--model.num-layers", "24", "--model.model-dim", "2048", "--model.mlp-dim", "8192"),
}


class Row(NamedTuple):
    """A row: `METHODS` and `SIZES` by name, and what else `nanogpt plan` is told."""

    target: str
    method: str
    size: str = "124M"
    words: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What it is known by."""
        return " | ".join((self.target, self.size, self.method, *self.words))

    @property
    def plan(self) -> list[str]:
        """Words for `nanogpt plan`; 16 rows a device at a time, unless something else is said."""
        devices = 1 if self.target.endswith(":1") else 8
        rows = () if "--data.microbatch-rows" in self.words else (
            "--data.microbatch-rows", str(16 * devices)
        )  # fmt: skip
        # The others of a table take its first row's, see `read_rows`.
        step = () if self in FIRST or "--programs" in self.words else ("--programs", "train")
        method = ("--optimizer", *METHODS[self.method])
        return ["--target", self.target, *method, *SIZES[self.size], *rows, *self.words, *step]


FSDP = ("--mesh", "fsdp=8", "--data.microbatch-rows", "64")
LAYERS = ("--layers", "2", "--data.microbatch-rows", "64")
UPDATE = ("--programs", "update")
LARGEST = ("--programs", "train", "--largest-microbatch")
ON_TPUS = ("Shampoo, polynomial", "AdamW", "Muon of track 3")
ROWS = (
    *(Row("h100:8", method) for method in METHODS),
    *(Row("h100:1", method) for method in METHODS if method != WHOLE),
    *(
        Row("h100:8", method, size, FSDP)
        for size in ("350M", "1.3B")
        for method in ("Shampoo, polynomial", "Muon of track 3")
    ),
    *(Row("v5e:2x4", method, "124M", LAYERS) for method in ON_TPUS),
    *(Row("v5e:2x4", method, "124M", UPDATE) for method in ON_TPUS),
    *(Row("a100:8", method) for method in METHODS if method != WHOLE),
    *(Row("v5p:2x2x2", method, "124M", LAYERS) for method in ON_TPUS),
    *(Row("v5p:2x2x2", method, "124M", UPDATE) for method in ON_TPUS),
    *(Row(target, method) for target in ("b200:8", "h200:8") for method in MAIN),
    *(Row("h100:8", method, "124M", LARGEST) for method in ("AdamW", "Shampoo, eigh")),
)
FIRST = tuple({group(row._asdict()): row for row in reversed(ROWS)}.values())


def made(row: Row, seconds: int) -> dict[str, Any]:
    """What `nanogpt plan` says of a row, or why it says nothing.

    Args:
      row: Which.
      seconds: Processor time it may take.
    """
    # By a shell: jax warns of functions that run between fork and exec.
    limited = ["sh", "-c", f'ulimit -t {seconds}; exec "$@"', "sh", *COMMAND, *row.plan]
    done = subprocess.run(limited, capture_output=True, text=True)
    label = {"row": row.name, **row._asdict()}
    if done.returncode == 0:
        return label | json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0:
        return label | {"failed": f"not finished in {seconds} processor seconds"}
    return label | {"failed": done.stderr.strip().splitlines()[-1][:300]}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help="parts of names of rows; none: all")
    parser.add_argument("--seconds", type=int, default=900, help="processor time of a row")
    parser.add_argument("--write", action="store_true", help="compile nothing, write the tables")
    parser.add_argument("--out", type=pathlib.Path, default=DOCS)
    args = parser.parse_args()
    path = args.out / "hardware.jsonl"
    for row in () if args.write else ROWS:
        chosen = not args.rows or any(part in row.name for part in args.rows)
        if chosen and row.name not in read_rows(path):
            line = made(row, args.seconds)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(row.name, line.get("failed", "done"), flush=True)
    found = read_rows(path)
    write_tables(args.out / "hardware.md", [found[r.name] for r in ROWS if r.name in found])


if __name__ == "__main__":
    main()
